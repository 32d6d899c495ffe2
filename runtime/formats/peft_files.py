"""PEFT's LoRA folders: `adapter_config.json` and `adapter_model.safetensors`, without a model.

A key is `base_model.model.<module>.lora_A.weight` [r, in] or `.lora_B.weight` [out, r]; for embeddings
`.lora_embedding_A` [r, vocab] and `.lora_embedding_B` [dim, r]; with `lora_bias` there is `.lora_B.bias` [out], with DoRA
`.lora_magnitude_vector` [out]; any other key is a parameter that was trained in full
(`modules_to_save`, `bias`). With `target_parameters`, fused experts mostly, a layer is named by its parameter, and
`expert_files` says how the files hold it. The adapter's name is no part of the files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ...errors import CheckpointError, InputPathError
from ...tensor import is_finite
from .atomic import new_folder, write_files
from .checkpoint_dir import open_checkpoint, read_json
from .expert_files import parameter_names, unflatten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

# The parts of a key that say which factor of which kind of layer it holds.
_FACTORS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    ".lora_B.bias": ("bias", False),
    ".lora_magnitude_vector": ("magnitude", False),
    ".lora_magnitude_vector.weight": ("magnitude", False),
}
# LoraConfig's options that change what the adapter computes in a way that we do not implement.
_UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# These initialisations subtract the adapter's start from the base weight, which the adapter's files do not record.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one module: `a` [r, in], `b` [out, r]; what it adds to the weight is `scaling * b @ a`.

    `bias` [out], times `scaling`, is added to the module's bias (`lora_bias`). `magnitude` [out] is DoRA's: the rows of
    weight + `scaling * b @ a` are brought to these lengths (arXiv 2402.09353).
    `parameter`: the layer is named by a parameter (`target_parameters`), to which `b @ a` is added as it is stored. Of
    fused experts: `a` [E, r, in], `b` [E, out, r].
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    scaling: float
    embedding: bool = False
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    parameter: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def experts(self) -> int | None:
        return self.a.shape[0] if self.a.dim() == 3 else None


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its files hold it: `config` as in adapter_config.json, `tensors` by their full keys."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def layers(self) -> dict[str, LoraLayer]:
        """Module path -> its factors and scaling, sorted. Raises CheckpointError (no partner, shapes, rank)."""
        factors: dict[str, dict[str, torch.Tensor]] = {}
        embeddings: set[str] = set()
        for key, tensor in self.tensors.items():
            found = _parse_key(key)
            if found is not None:
                module, factor, embedding = found
                factors.setdefault(module, {})[factor] = tensor
                embeddings.update({module} if embedding else ())
        named = parameter_names(factors, self.config.get("target_parameters") or ())
        layers = {
            named.get(m, m): _make_layer(m, named.get(m), factors[m], self.config, m in embeddings) for m in factors
        }
        return dict(sorted(layers.items()))

    def full_parameters(self) -> dict[str, torch.Tensor]:
        """Parameter name (no prefix) -> tensor, for what was trained in full, sorted."""
        return {parameter_name(key): tensor for key, tensor in self.full_tensors().items()}

    def full_tensors(self) -> dict[str, torch.Tensor]:
        """The same by their keys in the file, sorted."""
        return {key: self.tensors[key] for key in sorted(self.tensors) if _parse_key(key) is None}


def read_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> AdapterFiles:
    """Read and check a PEFT LoRA folder.

    Raises CheckpointError: missing, corrupt or truncated files; not LoRA; an option that changes the result and that we
    do not support (named); a tensor without its partner, of the wrong rank, or not finite; and for `.bin` weights
    (a pickle) unless `allow_pickle`, which reads them with `weights_only=True`.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputPathError(f"There is no adapter folder at {path}.")
    if not (path / CONFIG_FILE).is_file():
        inner = next((f.parent for f in sorted(path.glob(f"*/{CONFIG_FILE}"))), None)
        hint = f"did you mean {inner}?" if inner else "is it a PEFT adapter?"
        raise InputPathError(f"{path} holds no {CONFIG_FILE}; {hint}")
    config = read_json(path / CONFIG_FILE)
    try:
        _check_config(config)
        files = AdapterFiles(config, _read_tensors(path, allow_pickle))
        layers = files.layers()
    except CheckpointError as error:
        raise CheckpointError(f"The adapter {path} cannot be used: {error}") from error
    if not layers and not files.full_parameters():
        raise CheckpointError(f"The adapter {path} holds no tensors.")
    return files


def write_adapter(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    extra_files: Mapping[str, str] | None = None,
) -> Path:
    """Write a PEFT folder: same input, same bytes. `extra_files` maps further file names to their text.

    A new folder appears at once and whole. In a folder that exists, each file is replaced by itself, weights first, when
    all are on the disk.
    Raises OutputError where it cannot be written.
    """
    path = Path(path)
    sorted_config = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in config.items()}
    if isinstance(sorted_config.get("target_modules"), list | tuple):
        sorted_config["target_modules"] = sorted(sorted_config["target_modules"])
    plain = {key: tensors[key].detach().to("cpu", copy=True).contiguous() for key in sorted(tensors)}
    contents: dict[str, bytes | str] = {
        WEIGHTS_FILE: save(plain, metadata={"format": "pt"}),
        **(extra_files or {}),
        CONFIG_FILE: json.dumps(sorted_config, indent=2, sort_keys=True) + "\n",
    }
    if path.is_dir() and any(path.iterdir()):
        write_files(path, contents)
        return path
    with new_folder(path) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def _read_tensors(path: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if (path / WEIGHTS_FILE).is_file():
        checkpoint = open_checkpoint(path / WEIGHTS_FILE)
        # Copies: views of the memory-mapped file would change, or crash, when the file is overwritten.
        tensors = {key: checkpoint.tensor(key).clone() for key in checkpoint.specs}
    elif (path / PICKLE_FILE).is_file():
        if not allow_pickle:
            raise CheckpointError(
                f"{PICKLE_FILE} is a pickle; save it as safetensors, or pass allow_pickle (--allow-pickle)."
            )
        tensors = _read_pickle(path / PICKLE_FILE)
    else:
        raise CheckpointError(f"{WEIGHTS_FILE} is missing.")
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"the key {key!r} does not start with {PREFIX!r}, as PEFT's do.")
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(f"{key} holds NaN or infinite values.")
    return tensors


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own advice is to read it unsafely
        raise CheckpointError(
            f"{file.name} cannot be read safely: it holds more than tensors, or is damaged."
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file.name} cannot be read safely: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise CheckpointError(f"{file.name} holds something else than named tensors.")
    return {str(key): tensors[key] for key in sorted(tensors)}


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"its peft_type is {config.get('peft_type')!r}, only 'LORA' is supported.")
    for option, what in _UNSUPPORTED.items():
        if config.get(option):
            raise CheckpointError(f"it uses {what} ({option}), which is not supported.")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"init_lora_weights={init!r} changed the base weights too; convert it to plain LoRA in PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"target_parameters is {named!r}, not a list of names.")
    if not _is_number(config.get("lora_alpha", 8)):
        raise CheckpointError(f"lora_alpha is {config['lora_alpha']!r}, not a finite number.")
    _check_ranks(config)


def _check_ranks(config: Mapping[str, Any]) -> None:
    if "r" not in config:
        raise CheckpointError(f"{CONFIG_FILE} does not say its rank r.")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_number(v) for v in patterns.values()):
            raise CheckpointError(f"{name} is {patterns!r}, not a table of module patterns and numbers.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{name} holds {pattern!r}, no regular expression: {error}.") from None
    for rank in (config["r"], *(config.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise CheckpointError(f"a rank is {rank!r}, not a whole number.")


def _parse_key(key: str) -> tuple[str, str, bool] | None:
    """Key -> (module path, "a", "b", "bias" or "magnitude", is embedding); None for a parameter trained in full."""
    for suffix, (factor, embedding) in _FACTORS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).removeprefix(PREFIX), factor, embedding
    if re.search(r"\.(lora_\w+|token_adapter)(\.|$)", key):
        raise CheckpointError(f"the key {key!r} is of a kind that is not supported.")
    return None


def _make_layer(
    module: str, parameter: str | None, factors: dict[str, torch.Tensor], config: dict[str, Any], embedding: bool
) -> LoraLayer:
    """`parameter`: the one which the factors of this wrapped module belong to."""
    missing = {"a", "b"} - set(factors)
    if missing:
        raise CheckpointError(f"{module} has no lora_{missing.pop().upper()}.")
    module = parameter or module
    a, b = factors["a"], factors["b"]
    if not (a.is_floating_point() and b.is_floating_point()):
        raise CheckpointError(f"{module}: its factors are {a.dtype} and {b.dtype}, not floating point.")
    shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
    if a.dim() != 2 or b.dim() != 2:
        raise CheckpointError(f"{module}: {shapes} are not matrices (convolutions are not supported).")
    rank = int(pattern_value(config.get("rank_pattern"), module, config["r"]))
    if parameter is not None and rank and a.shape[0] == b.shape[1] and a.shape[0] % rank == 0 and a.shape[0] > rank:
        a, b = unflatten(a, b, rank)
    elif a.shape[0] != b.shape[1] or a.shape[0] != rank or rank == 0:
        raise CheckpointError(f"{module}: {shapes} do not agree with the rank {rank} in {CONFIG_FILE}.")
    for name, option in (("bias", "lora_bias"), ("magnitude", "use_dora")):
        vector, asked = factors.get(name), bool(config.get(option))
        if embedding and (vector is not None or asked):
            raise CheckpointError(f"{module}: {option} of an embedding is not supported.")
        if (vector is not None) != asked:
            has = "no" if vector is None else "a"
            raise CheckpointError(f"{module} has {has} {name} vector, but {option} is {asked} in {CONFIG_FILE}.")
        if vector is not None and tuple(vector.shape) != (b.shape[0],):
            raise CheckpointError(f"{module}: its {name} {list(vector.shape)} does not fit {shapes}.")
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    vectors = factors.get("bias"), factors.get("magnitude")
    return LoraLayer(a, b, alpha, scaling, embedding, *vectors, parameter=parameter is not None)


def parameter_name(key: str) -> str:
    """The model's name of a parameter that was trained in full: PEFT's has the layers in it that wrap its module."""
    return re.sub(r"(\.base_layer)+\.", ".", key.removeprefix(PREFIX))


def wrapped_key(name: str, wrappers: Mapping[str, int]) -> str:
    """The inverse: `wrappers` says how many of an adapter's layers wrap a module."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}{'.base_layer' * wrappers.get(module, 0)}.{leaf}"


def only_foldable(layers: Mapping[str, LoraLayer]) -> str | None:
    """Why these layers can be folded into weights only, not trained or combined here; None if they can."""
    for module, layer in layers.items():
        if layer.magnitude is not None:
            return f"{module} uses DoRA (use_dora), which can be folded by export only"
        if layer.bias is not None:
            return f"{module} has a bias on lora_B (lora_bias), which can be folded by export only"
    return None


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first pattern that matches the module's path or a dotted suffix of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_number(value: object) -> bool:
    # The bounds are false for NaN, and safe for JSON's integers of any length, which isfinite() is not.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30
