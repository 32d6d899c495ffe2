"""Saving a split model through torch.distributed.checkpoint and going on from it on another number of ranks."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import Decoder, batches, main, prepared, train, train_together, trainable, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import qlora_compile as qc
from qlora_compile.modules import adapter_sites

FOLDER = Path(sys.argv[1]).parent
TRAINED = StateDictOptions(ignore_frozen_params=True)
# eps well above a gradient's rounding: AdamW divides by its size, and would make a difference of 1e-9 one of lr
NUMBERS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, **NUMBERS),
    "paged": lambda parameters: qc.PagedAdamW(parameters, **NUMBERS, device_budget="1MiB"),
    "paged8": lambda parameters: qc.PagedAdamW(parameters, **NUMBERS, state_bits=8),
}
STEPS = 2  # on each number of ranks


def _model(mesh: DeviceMesh) -> Decoder:
    model = prepared()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of every trained parameter and moment, gathered."""
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in trainable(model):
        tensors = {"value": parameter} | dict(optimizer.state[parameter])
        for key, tensor in tensors.items():
            values = whole(torch.as_tensor(tensor)).contiguous().numpy().tobytes()
            found[f"{names[id(parameter)]} {key}"] = hashlib.sha256(values).hexdigest()
    return found


def _run(mesh: DeviceMesh, kind: str, done: int) -> dict[str, Any]:
    """Go on after `done` steps (0: start) for STEPS more, and save."""
    model = _model(mesh)
    optimizer = OPTIMIZERS[kind](trainable(model))
    found: dict[str, Any] = {}
    if done:
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.fill_(9)  # whatever is not loaded shows
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=TRAINED)))
        dcp.load(state, checkpoint_id=FOLDER / f"{kind}-{done}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        found["loaded"] = _digest(model, optimizer)
    found["losses"] = train_together(model, optimizer, STEPS, skip=done)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=TRAINED)))
    dcp.save(state, checkpoint_id=FOLDER / f"{kind}-{done + STEPS}")
    return found | {"saved": _digest(model, optimizer)}


def straight(mesh: DeviceMesh) -> list[float]:
    """One process from beginning to end."""
    model = prepared()
    return train(model, OPTIMIZERS["adamw"](trainable(model)), batches(3 * STEPS))


def save_everything(mesh: DeviceMesh) -> None:
    """4-bit weights too."""
    dcp.save(get_model_state_dict(_model(mesh)), checkpoint_id=FOLDER / "everything")


def load_everything(mesh: DeviceMesh) -> dict[str, bool]:
    """Into a model of other weights; every byte is then the saved one's."""
    expected, model = prepared(), prepared(weights_seed=4)
    assert not torch.equal(_codes(model)["blocks.0.q"], _codes(expected)["blocks.0.q"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=FOLDER / "everything")
    set_model_state_dict(model, state)
    for block in model.blocks:
        block.unshard()
    pairs = zip(adapter_sites(model).values(), adapter_sites(expected).values(), strict=True)
    return {
        one.name: all(
            torch.equal(getattr(one.weight, part), getattr(two.weight, part))
            for part in ("codes", "absmax", "absmax_scale", "absmax_offset")
        )
        for one, two in pairs
    }


def _codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: site.weight.codes for name, site in adapter_sites(model).items()}


def save_adapter(mesh: DeviceMesh) -> dict[str, bool]:
    """PEFT's files of a split model, by rank 0, are those of a whole one, byte for byte."""
    qc.save_adapter(_model(mesh), FOLDER / "split")
    if dist.get_rank() == 0:
        qc.save_adapter(prepared(), FOLDER / "whole")
    dist.barrier()
    files = sorted(path.name for path in (FOLDER / "whole").iterdir())
    return {name: (FOLDER / "split" / name).read_bytes() == (FOLDER / "whole" / name).read_bytes() for name in files}


CHECKS: dict[str, Any] = {
    f"{kind}-{done}": functools.partial(_run, kind=kind, done=done) for kind in OPTIMIZERS for done in (0, 2, 4)
}
CHECKS |= {check.__name__: check for check in (straight, save_everything, load_everything, save_adapter)}

if __name__ == "__main__":
    main(CHECKS)
