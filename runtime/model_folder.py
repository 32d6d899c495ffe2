"""The folder that `save_pretrained` of a model with adapters writes, and transformers' `Trainer` resumes from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from ..modules import adapter_parameters, adapter_sites
from .adapters import save_adapter
from .formats.atomic import write_file
from .full_parameters import loaded_in_full, modules_saved_in_full
from .sharded import gathered, has_shards

TRAINED_FILE = "model.safetensors"  # the name under which Trainer looks for the weights of a model that is not PEFT's


def has_adapters(model: nn.Module) -> bool:
    return any(site.adapters for site in adapter_sites(model).values())


def save_model_folder(model: nn.Module, path: str | os.PathLike[str], *, write: bool = True) -> None:
    """Adapter "default" (else the first) as PEFT files in `path`, others in folders of their names, as PEFT writes them.

    Beside them TRAINED_FILE holds all that trains under the model's own names, to the bit. Of a model that FSDP2 split
    every rank has to call it, and rank 0 writes; else one that is to `write`. Raises OutputError.
    """
    split = has_shards(model)
    if not (write or split):
        return
    folder = Path(path)
    names = sorted({name for site in adapter_sites(model).values() for name in site.adapters})
    first = "default" if "default" in names else names[0]
    for name in names:
        save_adapter(model, folder if name == first else folder / name.replace("/", "_"), name)
    state = {key: gathered(tensor.detach()) for key, tensor in _trained_state(model).items()}
    if not split or torch.distributed.get_rank() == 0:
        plain = {key: state[key].to("cpu", copy=True).contiguous() for key in sorted(state)}
        write_file(folder / TRAINED_FILE, save(plain, metadata={"format": "pt"}))


def trained_names(model: nn.Module) -> set[str]:
    """The names in TRAINED_FILE."""
    return set(_trained_state(model))


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of the state dictionary that are adapters, or were trained in full."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    saved = tuple(f"{name}." for name in modules_saved_in_full(model))
    loaded = loaded_in_full(model)
    entries = model.state_dict(keep_vars=True).items()
    return {k: tensor for k, tensor in entries if id(tensor) in adapters or k in loaded or k.startswith(saved)}
