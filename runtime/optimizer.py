"""The optimizer of a training run, made in one place so that an empty one is refused in one place."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import NoAdapterError
from ..modules import adapter_parameters
from ..page_plan import PAGED

NO_ADAPTERS = (
    "The optimizer was given no adapter parameters: call qlora_compile.prepare(model, config) before making "
    "it, because an unprepared model gets its adapters only when it is compiled, at its first call."
)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `prepare` left to train, by name: adapters, and the modules to save."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_adapters(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raises NoAdapterError where no adapter of `model` is among `parameters`."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    if not any(id(parameter) in adapters for parameter in parameters):
        raise NoAdapterError(NO_ADAPTERS)


OPTIMIZERS = ("adamw", *PAGED)


def make_optimizer(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    name: str = "adamw",
    lr: float = 2e-4,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    device_budget: int | str | None = None,
    page_folder: str | Path | None = None,
    step_in_backward: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of that name (one of OPTIMIZERS) over `parameters` (None: all that train).

    "adamw" is torch's, in one fused sweep where the device has one. `betas` None: the optimizer's own. `device_budget`,
    `page_folder` and `step_in_backward` are for the paged ones. Raises NoAdapterError where no adapter is among the
    parameters.
    """
    chosen = list(trainable_parameters(model).values() if parameters is None else parameters)
    check_adapters(model, chosen)
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    common |= {} if betas is None else {"betas": betas}
    if name == "adamw":
        fused = all(parameter.device.type in ("cpu", "cuda") for parameter in chosen)
        return torch.optim.AdamW(chosen, eps=eps, fused=fused, **common)
    from .paged_optimizer import PagedAdamW, PagedLion

    common |= {"device_budget": device_budget, "page_folder": page_folder, "step_in_backward": step_in_backward}
    if name == "paged_lion":
        return PagedLion(chosen, **common)
    return PagedAdamW(chosen, eps=eps, state_bits=8 if name == "paged_adamw8bit" else 32, **common)
