"""Folders and files -> causal language models: Hugging Face folders, and GGUF files unpacked to dense weights."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError, InputPathError, MissingDependencyError
from .formats.atomic import check_output_folder, new_folder
from .formats.bnb_files import quantized_keys, read_state
from .formats.checkpoint_dir import open_checkpoint, read_json
from .gguf_reading import GGUFFile

# What transformers, tokenizers, safetensors and gguf were seen to raise on damaged files.
READ_ERRORS: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)
READ_ERRORS += (RuntimeError, MemoryError, ArithmeticError, AssertionError, struct.error)


class ModelSource(NamedTuple):
    """Where a model lies: its folder and, where it is one, the GGUF file's name in it."""

    folder: Path
    gguf_file: str | None


def locate_model(path: Path | str) -> ModelSource:
    """A folder with config.json, a .gguf file, or a folder with exactly one. Raises CheckpointError otherwise."""
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputPathError(f"{path} is not a model: give a folder with config.json, or a .gguf file.")
        return ModelSource(path.parent, path.name)
    if not path.is_dir():
        raise InputPathError(f"There is no model folder or .gguf file {path}.")
    if (path / "config.json").is_file():
        return ModelSource(path, None)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource(path, ggufs[0])
    if ggufs:
        raise InputPathError(f"{path} holds {len(ggufs)} .gguf files: name one of {', '.join(ggufs)}.")
    raise InputPathError(f"{path} holds neither a config.json nor a .gguf file, so it is not a model folder.")


def load_model(path: Path | str, dtype: torch.dtype | None = torch.bfloat16) -> tuple[Any, Any]:
    """A model folder or .gguf file -> (model in `dtype` on the CPU, tokenizer).

    GGUF weights are unpacked in fp32 and rounded to `dtype` once. None rounds nothing: fp32, or for a parameter from a
    GGUF file the 16-bit type of the file's matrices, where that holds it. Nothing is downloaded. Raises CheckpointError
    where it is missing, corrupt, truncated or incomplete, and for a GGUF file that holds what the model has no place
    for; MissingDependencyError without transformers (or gguf).
    """
    return load_weights(path, dtype), load_tokenizer(path)


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a model folder or .gguf file; errors as `load_model`."""
    source = locate_model(path)
    transformers = _transformers(source)
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with _quiet(transformers), _reading(path, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(str(source.folder), local_files_only=True, **options)


def load_weights(path: Path | str, dtype: torch.dtype | None = torch.bfloat16, *, map_experts: bool = False) -> Any:
    """The model of a model folder or .gguf file, in evaluation mode; `dtype` and errors as `load_model`.

    `map_experts`: experts that the checkpoint holds apart are MappedExperts, which `join_experts` makes plain ones.
    """
    source = locate_model(path)
    transformers = _transformers(source)
    options: dict[str, Any] = {"dtype": dtype or torch.float32}
    gguf_file = None
    if source.gguf_file:
        # Without it the weights stay packed in transformers' own GGUF layers, which no pass of ours knows.
        unpacked = transformers.GgufConfig(dequantize=True)
        options = {"dtype": torch.float32, "gguf_file": source.gguf_file, "quantization_config": unpacked}
        with _reading(path, "configuration"):
            gguf_file = GGUFFile(source.folder / source.gguf_file)
            options["config"] = gguf_file.config()
    elif is_bitsandbytes_folder(source.folder):
        from .transformers_quantizer import QLoRAQuantizationConfig

        options["quantization_config"] = QLoRAQuantizationConfig()  # its codes as they are, nothing quantized again
    elif map_experts and not _is_quantized(source.folder):
        from .streamed_experts import MapExpertsConfig

        options["quantization_config"] = MapExpertsConfig()
    with _quiet(transformers), _reading(path, "weights"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.folder), local_files_only=True, output_loading_info=True, **options
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of the model's tensors, for example {missing[0]}.")
    if gguf_file is not None:
        with _reading(path, "weights"):
            gguf_file.check_all_taken(model)
        if dtype is None:
            gguf_file.narrow_as_stored(model)
        else:
            model = model.to(dtype)
        # The weights are plain ones now: a saved copy must not claim to be quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.eval()


def empty_model(path: Path | str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model that a folder, a .gguf file or a config.json alone describes, on the meta device: no weight is read.

    Raises CheckpointError where there is no such model, MissingDependencyError without transformers (or gguf).
    """
    path = Path(path)
    source = ModelSource(path.parent, None) if path.suffix == ".json" and path.is_file() else locate_model(path)
    transformers = _transformers(source)
    named = path if path.suffix == ".json" else source.folder
    with _quiet(transformers), _reading(path, "configuration"):
        if source.gguf_file:
            config = GGUFFile(source.folder / source.gguf_file).config()
        else:
            config = transformers.AutoConfig.from_pretrained(str(named), local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # a packed checkpoint's: what it stands for is dense
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def is_bitsandbytes_folder(folder: Path) -> bool:
    """Whether the folder's config.json says that bitsandbytes quantized it to 4 bits, with every state readable.

    Raises CheckpointError (a state that is corrupt, or of a kind that cannot be read).
    """
    quantized = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(quantized, dict) or not (quantized.get("load_in_4bit") or quantized.get("_load_in_4bit")):
        return False
    checkpoint = open_checkpoint(folder)
    for key, state in quantized_keys(checkpoint.specs).items():
        read_state(key, checkpoint.tensor(state))
    return True


def _is_quantized(folder: Path) -> bool:
    """Whether the folder's config.json says that its weights are, by whatever method."""
    config = read_json(folder / "config.json")
    parts = (config, config.get("text_config"))
    return any(isinstance(part, dict) and part.get("quantization_config") for part in parts)


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of every parameter's name, shape, dtype and first 64 values: enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_first_values(parameter.detach(), 64).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _first_values(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`tensor.flatten()[:count]`, without more of a tensor than they lie in: experts may be mapped only."""
    while tensor.dim() > 1 and tensor.shape[1:].numel() >= count:
        tensor = tensor[0]
    return tensor.flatten()[:count]


def materialize(path: Path | str, out: Path | str, dtype: torch.dtype | None = torch.bfloat16) -> Path:
    """A model of any kind -> a Hugging Face folder `out` with safetensors, config and tokenizer; returns `out`.

    `dtype` as in `load_model`. The folder appears at once, whole. Raises OutputError where `out` is not empty or cannot
    be written, else what `load_model` does.
    """
    out, source = Path(out), locate_model(path)
    check_output_folder(out)
    model, tokenizer = load_model(path, dtype)
    with new_folder(out) as temporary, _quiet(_transformers(source)):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return out


def _transformers(source: ModelSource) -> Any:
    """The package, imported when it is first needed. Raises MissingDependencyError."""
    purpose = f"Loading {source.folder / (source.gguf_file or '')}"
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "transformers", purpose) from None
    if source.gguf_file:
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise MissingDependencyError("gguf", "gguf", purpose) from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers in between ours."""
    logging = transformers.utils.logging
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(path: Path | str, what: str) -> Iterator[None]:
    """Whatever the readers of a broken model raise -> CheckpointError with their first line."""
    from safetensors import SafetensorError

    errors: tuple[type[Exception], ...] = (*READ_ERRORS, SafetensorError)
    try:
        yield
    except errors as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"The {what} of {path} cannot be loaded: {lines[0]}") from error
