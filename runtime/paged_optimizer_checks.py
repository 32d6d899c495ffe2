"""What is wrong with what a paged optimizer was given, said before anything is made of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelStateError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_SCALER = "step_in_backward=True updates before a GradScaler could unscale: train in bfloat16, or without it."


def trainable(params: list[Any]) -> Iterator[Tensor]:
    """The parameters that train, of what `torch.optim.Optimizer` takes: tensors, (name, tensor) or groups of either."""
    for item in params:
        tensors = item["params"] if isinstance(item, dict) else item[1] if isinstance(item, tuple) else item
        for tensor in [tensors] if isinstance(tensors, Tensor) else list(tensors):
            tensor = tensor[1] if isinstance(tensor, tuple) else tensor
            if tensor.requires_grad:
                yield tensor


def check_numbers(defaults: dict[str, Any]) -> None:
    """Raises ConfigError naming the hyperparameter that is out of range."""
    for name, value in defaults.items():
        numbers = value if name == "betas" and isinstance(value, (tuple, list)) else (value,)
        least_ok = all(_is_number(number) and float(number) >= 0 for number in numbers)
        if not least_ok or (name == "betas" and not (len(numbers) == 2 and all(number < 1 for number in numbers))):
            wanted = "two numbers of at least 0 and below 1" if name == "betas" else "a number of at least 0"
            raise ConfigError(f"{name} must be {wanted}, got {value!r}.")


REFUSED = ("amsgrad", "maximize", "differentiable")  # what torch's AdamW can do and ours cannot
OF_ALL = ("state_bits", "device_budget", "host_budget", "page_folder", "step_in_backward")  # no group has its own


def check_group(group: dict[str, Any], name: str) -> None:
    """Raises ConfigError for a group that asks for what the optimizer `name` does not do, or a number out of range."""
    check_numbers({option: group[option] for option in ("lr", "betas", "eps", "weight_decay") if option in group})
    check_options(group, name)
    params = group["params"]
    if len({id(parameter) for parameter in params}) < len(params):
        raise ConfigError(
            f"A parameter group of {name} has a parameter twice, which would be updated twice: give it once."
        )
    if group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
        raise ConfigError(f"{name} decays weights apart from the gradient: leave out decoupled_weight_decay=False.")


def check_options(group: dict[str, Any], name: str) -> None:
    """Raises ConfigError for an option that the optimizer `name` does not know, or has for all groups alike."""
    for option in REFUSED:
        if group.get(option):
            raise ConfigError(f"{name} does not know {option}=True: leave it out of the parameter group.")
    for option in OF_ALL:
        if option in group:
            raise ConfigError(
                f"{option} is of the whole optimizer: give it to {name}(...), and not to a parameter group."
            )


def warn_of_no_gradient(name: str) -> None:
    """Of a step that changed nothing."""
    warnings.warn(
        f"No parameter of this {name} has a gradient, so its step changed nothing. Call backward() before step(), and make "
        "the optimizer after qlora_compile.prepare(model, config): an unprepared model gets its adapters, which are new "
        "parameters, only when it is compiled, at its first call.",
        UserWarning,
        stacklevel=3,
    )


def _is_number(value: Any) -> bool:
    """A real number, or the 0-dim tensor that torch's optimizers take as a learning rate."""
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def check_place(parameter: Tensor, device: torch.device) -> None:
    """Raises ModelStateError for a parameter that is not on the device of the pages, or of a type without a layout."""
    if parameter.device != device:
        raise ModelStateError(
            f"A parameter of shape {tuple(parameter.shape)} is on {parameter.device}, but this optimizer's pages are "
            f"for {device}: move the model before making the optimizer, and give it one device's parameters."
        )
    if device.type == "meta":
        raise ModelStateError(
            "The parameters are on the meta device and have no values: load the model before making the optimizer."
        )
    if parameter.dtype not in DTYPES:
        raise ModelStateError(f"Optimizer states are for fp32, bf16 and fp16 parameters, not {parameter.dtype}.")


def check_unchanged(parameter: Tensor, dtype: torch.dtype, numel: int) -> None:
    """Raises ModelStateError for a parameter that is not of the type and size that its state was made for."""
    if parameter.dtype is not dtype:
        raise ModelStateError(
            f"A parameter of shape {tuple(parameter.shape)} is {parameter.dtype} now and was {dtype} when its "
            "state was made: convert the model before making the optimizer."
        )
    if parameter.numel() != numel:
        raise ModelStateError(
            f"A parameter of shape {tuple(parameter.shape)} had {numel} elements when its state was made: make a new "
            "optimizer after resizing the model."
        )


def check_gradient(gradient: Tensor, parameter: Tensor) -> None:
    """Raises ModelStateError for a gradient that is not of its parameter's type, size and device."""
    if (
        gradient.dtype is not parameter.dtype
        or gradient.numel() != parameter.numel()
        or gradient.device != parameter.device
    ):
        raise ModelStateError(
            f"A gradient is {gradient.dtype} {[*gradient.shape]} on {gradient.device}, its parameter {parameter.dtype} "
            f"{[*parameter.shape]} on {parameter.device}: call zero_grad() after changing a parameter, and leave its "
            "grad_dtype as it is."
        )


def check_one_process(name: str) -> None:
    """Raises ModelStateError where gradients are averaged over several processes after an update would have used them."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise ModelStateError(
            f"{name} with step_in_backward=True updates before gradients are averaged over "
            f"{torch.distributed.get_world_size()} processes: DDP and FSDP need step_in_backward=False."
        )
