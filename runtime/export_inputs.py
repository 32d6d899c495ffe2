"""What an export is given: adapters by folder or by name, a base that may be a GGUF file, and where not to write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, InputPathError, NoAdapterError, OutputError
from ..modules import adapter_sites
from .adapters import adapter_files, adapter_weights
from .export_sources import check_not_peft
from .fold_plan import WeightedAdapter
from .formats.peft_files import read_adapter

PathLike = str | os.PathLike[str]
Adapters = Mapping[str, float] | Mapping[Path, float] | Iterable[PathLike] | PathLike | None


def read_adapters(
    model: nn.Module | None, adapters: Adapters, allow_pickle: bool, *, plain: bool = False
) -> list[WeightedAdapter]:
    """Read every adapter, sorted by name: the order in which they are named changes no byte of the result.

    `plain`: the model's own are made relative to the original weights (`adapter_files`). What they trained in full is the
    model's and counts once and whole, whatever their weights are. Raises ModelStateError for a model of PEFT's.
    """
    if model is not None:
        check_not_peft(model)
    own = adapter_weights(model) if model is not None and adapter_sites(model) else {}
    if adapters is None:
        weights = {name: weight for name, weight in own.items() if weight}
    elif isinstance(adapters, Mapping):
        weights = {str(name): weight for name, weight in adapters.items()}
    else:
        weights = dict.fromkeys([str(adapters)] if isinstance(adapters, str | os.PathLike) else map(str, adapters), 1.0)
    found: list[WeightedAdapter] = []
    for name, weight in sorted(weights.items()):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            raise ConfigError(f"The weight of adapter {name} must be a finite number, got {weight!r}.")
        if model is not None and name in own:
            adapter = WeightedAdapter(name, weight, adapter_files(model, name, plain=plain), full=1.0)
            again = any(other.folder is None for other in found)
            found.append(
                replace(adapter, files=replace(adapter.files, tensors=lora_only(adapter))) if again else adapter
            )
        elif model is not None and not Path(name).is_dir():
            raise NoAdapterError(f"{name!r} is neither an adapter of the model ({', '.join(own)}) nor a folder.")
        else:
            files = read_adapter(name, allow_pickle=allow_pickle)
            found.append(WeightedAdapter(name, weight, files, Path(name)))
    return found


def lora_only(adapter: WeightedAdapter) -> dict[str, torch.Tensor]:
    """The low-rank tensors, without what was trained in full."""
    return {key: tensor for key, tensor in adapter.files.tensors.items() if ".lora_" in key}


@contextmanager
def dense_folder(folder: Path | None) -> Iterator[Path | None]:
    """A GGUF file is unpacked, unrounded, into a temporary folder first; a safetensors folder is used as it is.

    Raises InputPathError where there is neither.
    """
    if folder is not None and not folder.exists():
        raise InputPathError(f"There is no model folder or .gguf file {folder}.")
    if folder is None or folder.suffix.lower() != ".gguf" or not folder.is_file():
        yield folder
        return
    from .models import materialize

    with tempfile.TemporaryDirectory(prefix="qlora-compile-") as temporary:
        yield materialize(folder, Path(temporary) / "base", None)


def check_not_an_input(out: Path, inputs: list[Path]) -> None:
    """Overwriting must never remove what is being read."""
    real = Path(os.path.realpath(out))
    for path in inputs:
        source = Path(os.path.realpath(path))
        if real == source or real in source.parents:
            raise OutputError(f"The output {out} holds the input {path}; choose another folder.")
