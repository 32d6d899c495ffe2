"""Experts that a checkpoint holds apart, as one parameter that is not in memory: each matrix is read when it is asked for.

    experts.0.w1, experts.0.w3, experts.1.w1, ...  <-  weight[1]: w1 and w3 of expert 1 from the mapped file, joined

`prepare` quantizes such a parameter matrix by matrix, so that nothing else of it is ever dense. Any other op gets all of
them, joined for the time of that op: a dense model is evaluated with one layer's experts in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ModelStateError

_aten = torch.ops.aten


class MappedExperts(torch.Tensor):
    """A dense weight [E, a, b] on the CPU; `read(e)` gives the matrix [a, b] of expert e in the weight's dtype.

    Only to be read: a write raises ModelStateError.
    """

    read: Callable[[int], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int], dtype: torch.dtype, read: Callable[[int], Tensor]) -> MappedExperts:
        return cast(MappedExperts, torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype))

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, read: Callable[[int], Tensor]) -> None:
        self.read = read

    __torch_function__ = torch._C._disabled_torch_function_impl

    def joined(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """All matrices in one plain tensor; on their way to another device one is in memory at a time."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        for expert, matrix in enumerate(out if out.device.type != "meta" else ()):
            matrix.copy_(self.read(expert))
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.detach.default:
            (mapped,) = args
            return MappedExperts(tuple(mapped.shape), mapped.dtype, mapped.read)
        if func is _aten.select.int and args[1] == 0:
            mapped, _, expert = args
            return mapped.read(range(mapped.shape[0])[expert])
        if func is _aten._to_copy.default:
            return args[0].joined(kwargs.get("dtype"), kwargs.get("device") or "cpu")
        if any(to.is_write and isinstance(value, cls) for to, value in zip(func._schema.arguments, args)):
            raise ModelStateError(f"{func} would write into experts that lie in a file: join_experts(model) first.")
        args, kwargs = tree_map(lambda value: value.joined() if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **kwargs)


def join_experts(model: nn.Module) -> None:
    """Every parameter that is still mapped -> a plain one, in memory."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, MappedExperts):
                module._parameters[name] = nn.Parameter(parameter.joined(), requires_grad=parameter.requires_grad)
