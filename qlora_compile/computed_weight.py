"""`ComputedWeight`: what reading an adapted parameter gives in eager code, with every write into it refused.

Such a parameter is computed anew whenever it is read, so `m.w.add_(1)`, or PEFT's `base_layer.weight.data += delta`, would
change a temporary and be lost without a word. Results of ops are plain tensors; views of the temporary are guarded too.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import ModelStateError

_OPERATORS = (
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)
_WRITES = {"__setitem__", "__set__", "__delete__", *(f"__i{name}__" for name in _OPERATORS)}
_WRITES_NO_VALUE = {"requires_grad_", "share_memory_", "rename_"}
# What may share the temporary's memory; `__get__` is `.data`, `.T` and the like.
_VIEWS = {"__get__", "__getitem__", "chunk", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select"}
_VIEWS |= {"split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as"}


class ComputedWeight(torch.Tensor):
    """A dense weight that was computed from what is stored. Raises ModelStateError where something writes into it."""

    site: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        first = args[0] if args else next(iter(kwargs.values()), None)
        for written in [kwargs.get("out"), first if _writes(name) else None]:
            for tensor in written if isinstance(written, (list, tuple)) else [written]:
                if isinstance(tensor, ComputedWeight):
                    _refuse(name, tensor)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return _guard_views(out, first) if name in _VIEWS and isinstance(first, ComputedWeight) else out


def computed(dense: Tensor, site: str) -> Tensor:
    """The tensor as one that refuses writes. Tensors of other classes (fake ones, functorch's) stay what they are."""
    if type(dense) is not torch.Tensor:
        return dense
    guarded = dense.as_subclass(ComputedWeight)
    guarded.site = site
    return guarded


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__") and name not in _WRITES_NO_VALUE
    return in_place or name in _WRITES


def _refuse(name: str, weight: ComputedWeight) -> NoReturn:
    what = "assigning to it" if name == "__set__" else name
    raise ModelStateError(
        f"The weight of {weight.site} is computed from its stored form and adapters whenever it is read, so {what} would "
        "be lost: to merge an adapter save it (save_adapter, or PEFT's save_pretrained) and call qlora_compile.export; one "
        "whose start changes the weight (PiSSA, OLoRA) is to be added before the weight is quantized."
    )


def _guard_views(out: Any, source: ComputedWeight) -> Any:
    if isinstance(out, (list, tuple)):
        return type(out)([_guard_views(part, source) for part in out]) if type(out) in (list, tuple) else out
    if not isinstance(out, Tensor):
        return out
    with torch._C.DisableTorchFunctionSubclass():
        shared = out.untyped_storage()._cdata == source.untyped_storage()._cdata
        return computed(out.as_subclass(torch.Tensor), source.site) if shared else out
