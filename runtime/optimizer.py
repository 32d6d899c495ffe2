"""The optimizer of a training run, made in one place so that an empty one is refused in one place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import NoAdapterError
from ..modules import adapter_parameters


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `prepare` left to train, by name: adapters, and the modules to save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_adapters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raises NoAdapterError where no adapter of `model` is among `parameters`."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    if not any(id(parameter) in adapters for parameter in parameters):
        raise NoAdapterError(
            "The optimizer was given no adapter parameters: call qlora_compile.prepare(model, config) before making "
            "it, because an unprepared model gets its adapters only when it is compiled, at its first call."
        )


def make_optimizer(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    lr: float = 2e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over `parameters` (None: all that train), in one fused sweep where the device has one.

    Raises NoAdapterError where no adapter is among them.
    """
    chosen = list(trainable_parameters(model).values() if parameters is None else parameters)
    check_adapters(model, chosen)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in chosen)
    return torch.optim.AdamW(chosen, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=fused)
