"""Hugging Face safetensors folders, read lazily from memory-mapped shards and written as a stream of tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError, ConfigError, InputPathError
from .atomic import BackgroundWriter, sync

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE_BYTES = 5_000_000_000

# safetensors' names, widest first: the order in which safetensors' own writer lays tensors out, so that wide elements
# stay aligned and our bytes equal its bytes.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIDE_FOLDERS = ("additional_chat_templates",)  # the one folder that tokenizers write
_ORDER = {name: position for position, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A safetensors folder (or single file): names, shapes and dtypes now, tensors when asked.

    `specs` maps each tensor's name to its TensorSpec, in sorted order. Tensors are views of the memory-mapped shard:
    copy before writing to one. Only the shard used last stays open.
    """

    def __init__(self, path: Path, shards: Mapping[str, Path], specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self.shards = dict(shards)
        self.specs = {key: specs[key] for key in sorted(specs)}
        self._open: tuple[Path, Any] | None = None

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype. Raises CheckpointError where its bytes cannot be read."""
        shard = self.shards[key]
        if self._open is None or self._open[0] != shard:
            self._open = (shard, _open_file(shard))
        try:
            return self._open[1].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"The tensor {key!r} cannot be read from {shard}: {error}.") from error

    def metadata(self) -> dict[str, str]:
        """What stands in the header of the (first) file beside the tensors."""
        return dict(_open_file(next(iter(self.shards.values()))).metadata() or {})

    def close(self) -> None:
        self._open = None

    def config(self) -> dict[str, Any]:
        """`config.json`, or {} where the folder has none. Raises CheckpointError where it is not JSON."""
        file = self.path / "config.json"
        return read_json(file) if file.is_file() else {}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open `path`: a folder with model.safetensors, one with an index and shards, or one .safetensors file.

    Raises CheckpointError for a missing, truncated or corrupt file, an index that leaves the folder, names a missing
    shard or a tensor that its shard lacks, and for a tensor that stands in two shards.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _load([path], path.parent)
    if not path.is_dir():
        raise InputPathError(f"There is no checkpoint at {path}: a folder with {SINGLE_FILE} is needed.")
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = _read_index(index)
        checkpoint = _load([path / name for name in sorted(set(weight_map.values()))], path)
        for key, name in weight_map.items():
            if checkpoint.shards.get(key) != path / name:
                raise CheckpointError(f"{index} says that {name} holds {key!r}, but it does not.")
        return checkpoint
    if (path / SINGLE_FILE).is_file():
        return _load([path / SINGLE_FILE], path)
    if any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{path} holds pickled weights only; convert them to safetensors, pickles are not read.")
    raise InputPathError(f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")


def read_json(file: Path, name: str | None = None) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError: missing file, not JSON, not an object, or a name that stands twice.

    `name` is for errors about a temporary copy.
    """
    named = name or file
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError(f"{named} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{named} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a duplicate found by _unique
        raise CheckpointError(f"{named} is corrupt: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{named} is corrupt: it holds a JSON {type(value).__name__}, not an object.")
    return value


def parse_size(size: int | str) -> int:
    """`"5GB"` -> 5_000_000_000 bytes; also MB, KB, GiB, MiB, KiB or a number. Raises ConfigError."""
    units = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    text = str(size).strip().upper()
    unit = text.lstrip("0123456789.")
    try:
        value = int(float(text.removesuffix(unit)) * units[unit.strip()]) if not isinstance(size, bool) else 0
    except (KeyError, ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ConfigError(f"max_shard_size must be a size such as '5GB' or a number of bytes, got {size!r}.")
    return value


def write_checkpoint(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], torch.Tensor],
    max_shard_size_bytes: int = MAX_SHARD_SIZE_BYTES,
    shard_done: Callable[[list[str], bool], None] | None = None,
) -> list[Path]:
    """Write safetensors shards (and an index where there are several) into `folder`; returns the shards' paths.

    `produce(key)` is called once a tensor, in the order of the file, and its result is dropped after it was written,
    which happens while the next one is made: two tensors are in memory. Same tensors, same bytes. A tensor larger than
    the limit gets its own shard.
    With `shard_done`, a shard that is there already is kept (it got its name when it was whole, and on the disk), and
    `shard_done(its names, whether it was written now)` is called for each.
    Raises CheckpointError where `produce` returns another dtype or shape than `specs` says; OSError from writing.
    """
    plan = plan_shards(specs, max_shard_size_bytes)
    names = [SINGLE_FILE] if len(plan) == 1 else _shard_names(len(plan))
    for name, keys in zip(names, plan, strict=True):
        if shard_done is not None and (folder / name).is_file():
            shard_done(keys, False)
            continue
        part = folder / (name if shard_done is None else f"{name}.part")
        with open(part, "wb") as file:
            _write_shard(file, {key: specs[key] for key in keys}, produce)
            if shard_done is not None:
                file.flush()
                sync(file.fileno())
        if shard_done is not None:
            os.replace(part, folder / name)
            shard_done(keys, True)
    if len(plan) > 1:
        weight_map = {key: name for name, keys in zip(names, plan, strict=True) for key in keys}
        metadata = {"total_size": sum(spec.nbytes for spec in specs.values())}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size_bytes: int) -> list[list[str]]:
    """Names sorted and cut into runs of at most `max_shard_size_bytes` (a larger tensor stands alone)."""
    plan: list[list[str]] = [[]]
    size = 0
    for key in sorted(specs):
        if plan[-1] and size + specs[key].nbytes > max_shard_size_bytes:
            plan.append([])
            size = 0
        plan[-1].append(key)
        size += specs[key].nbytes
    return plan


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what is not weights (config, tokenizer, chat template, generation config, ...) from `source` to `target`.

    Weights in any format, indices, other tools' adapters and hidden files stay behind. Returns the names, sorted.
    """
    left_out = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
    copied = []
    for file in sorted(source.iterdir()):
        name = file.name
        if file.is_file() and not name.startswith((".", "adapter_", "README")) and not name.endswith(left_out):
            shutil.copyfile(file, target / name)
            copied.append(name)
    for folder in (source / name for name in _SIDE_FOLDERS):
        if folder.is_dir():
            shutil.copytree(folder, target / folder.name, dirs_exist_ok=True)
            copied.append(folder.name)
    return sorted(copied)


def _load(files: list[Path], folder: Path) -> Checkpoint:
    shards: dict[str, Path] = {}
    specs: dict[str, TensorSpec] = {}
    for file in files:
        handle = _open_file(file)
        for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key in shards:
                raise CheckpointError(f"The tensor {key!r} stands in both {shards[key]} and {file.name}.")
            part = handle.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(f"{file}: the tensor {key!r} has the dtype {part.get_dtype()}: not supported.")
            shards[key] = file
            specs[key] = TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))
    if not specs:
        raise CheckpointError(f"{folder} holds no tensors.")
    return Checkpoint(folder, shards, specs)


def _open_file(file: Path) -> Any:
    """`safe_open` checks the header: its length, its JSON, and that the offsets fill the file exactly."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"The file {file} is missing.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({error}); fetch or write it again.") from error


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is corrupt: it has no weight_map.")
    for key, name in weight_map.items():
        # Only plain names: an index from elsewhere must not make us read outside of its folder.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index} is refused: it puts {key!r} into {name!r}, which is not a file name.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing.")
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return value


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(file: IO[bytes], specs: Mapping[str, TensorSpec], produce: Callable[[str], torch.Tensor]) -> None:
    """Header length (8 bytes, little endian), JSON header padded to 8 bytes, then the tensors one after another."""
    keys = sorted(specs, key=lambda key: (_ORDER[DTYPE_NAMES[specs[key].dtype]], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        spec = specs[key]
        span = [offset, offset + spec.nbytes]
        header[key] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    with BackgroundWriter(file) as writer:
        for key in keys:
            tensor = produce(key)
            if (tensor.dtype, tuple(tensor.shape)) != (specs[key].dtype, specs[key].shape):
                wanted = f"{specs[key].dtype} {list(specs[key].shape)}"
                raise CheckpointError(f"{key!r} should be {wanted}, but is {tensor.dtype} {list(tensor.shape)}.")
            writer.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
