"""Everything that a training run must carry over a restart <-> named tensors and JSON values of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .sharded import as_shard, gathered, is_sharded, local_part, part_like

Parameters = Mapping[str, nn.Parameter]
TENSORS = ("parameters", "optimizer", "rng")
STATE = ("optimizer", "scaler", "python_rng")


def capture(
    parameters: Parameters, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """-> (tensors by file, JSON state). `parameters` are the trained ones by name, in the optimizer's order.

    Those that FSDP2 split are gathered, moments too: what is stored fits any number of ranks. Every rank has to call it.
    """
    names = list(parameters)
    packed = optimizer.state_dict()
    moments: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in packed["state"].items():
        for key, value in values.items():
            store: dict[str, Any] = moments if isinstance(value, Tensor) else scalars
            store[f"{names[index]}/{key}"] = gathered(value)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in packed["param_groups"]]
    tensors = {
        "parameters": {name: gathered(parameter.detach()) for name, parameter in parameters.items()},
        "optimizer": moments,
        "rng": rng_state(),
    }
    state = {
        "optimizer": {"class": type(optimizer).__name__, "groups": groups, "scalars": scalars},
        "scaler": None if scaler is None else scaler.state_dict(),
        "python_rng": random.getstate(),
    }
    return tensors, state


def restore(
    checkpoint: Checkpoint,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Put back what `capture` took, in place and bit for bit.

    Raises CheckpointError, with nothing changed, where the checkpoint's parameters are not those of this run.
    """
    check_complete(checkpoint)
    path = checkpoint.path
    stored, moments, rng = (checkpoint.tensors[name] for name in TENSORS)
    packed, scaler_state, python_rng = (checkpoint.state[name] for name in STATE)
    _check_same_parameters(stored, parameters, path)
    if packed["class"] != type(optimizer).__name__:
        raise CheckpointError(f"{path} was trained with {packed['class']}, this run uses {type(optimizer).__name__}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local_part(parameter).copy_(part_like(stored[name], parameter))
    _restore_optimizer(optimizer, parameters, packed, moments)
    if scaler is not None and scaler_state is not None:
        scaler.load_state_dict(scaler_state)
    restore_rng(rng)
    version, internal, gauss = python_rng
    random.setstate((version, tuple(internal), gauss))


def check_complete(checkpoint: Checkpoint, *further: str) -> None:
    """Raises CheckpointError where something of what `capture` took is not there, or a `further` value of the state."""
    missing = [name for name in TENSORS if name not in checkpoint.tensors]
    missing += [name for name in (*STATE, *further) if name not in checkpoint.state]
    if missing:
        raise CheckpointError(f"The checkpoint {checkpoint.path} holds no {missing[0]!r}: it is not a training run's.")


def _check_same_parameters(stored: Mapping[str, Tensor], parameters: Parameters, path: Any) -> None:
    for name, parameter in parameters.items():
        if name not in stored:
            raise CheckpointError(f"{path} has no {name}: it was trained with other adapters.")
        if stored[name].shape != parameter.shape:
            shapes = f"{tuple(stored[name].shape)} there and {tuple(parameter.shape)} here"
            raise CheckpointError(f"{path} does not fit: {name} is {shapes}.")
    extra = sorted(stored.keys() - parameters.keys())
    if extra:
        raise CheckpointError(f"{path} trains {extra[0]}, which this run does not: it was trained with other adapters.")


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, packed: Mapping[str, Any], moments: Mapping[str, Tensor]
) -> None:
    index = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for store in (moments, packed["scalars"]):
        for full_name, value in store.items():
            name, key = full_name.rsplit("/", 1)
            parameter = parameters[name]
            if is_sharded(parameter) and getattr(value, "shape", None) == parameter.shape:
                value = as_shard(part_like(value, parameter), parameter)
            state.setdefault(index[name], {})[key] = value
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in packed["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_state() -> dict[str, Tensor]:
    """torch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """`rng_state`'s reverse; devices that are not here are passed over."""
    torch.set_rng_state(states["cpu"])
    for name, value in states.items():
        if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, name)
