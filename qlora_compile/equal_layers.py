"""Equal layers of a prepared model, marked so that Dynamo traces one of them for all (`layer_tracing.py`).

A layer in a list of at least four of its class gets a subclass of that class, whose forward calls the old one; under our
backend through the op `equal_layer`. Eager code and other compilers see the old forward and nothing else.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator

from .class_edits import edited_class
from .modules import QLoRALinear

_LEAST = 4  # layers: two are traced where the embedding is frozen, since the first's x needs no gradient
ORIGINAL = "_qlora_layer_forward"


class _EqualLayer(HigherOrderOperator):  # type: ignore[misc]
    """`equal_layer(layer, *args)`: what the layer's own forward gives. Dynamo knows it by name."""

    def __init__(self) -> None:
        super().__init__("qlora_equal_layer")

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(layer, ORIGINAL)(*args, **kwargs)


equal_layer = _EqualLayer()


def mark_layers(root: nn.Module) -> int:
    """Mark the layers of the outermost lists of equal layers that hold adapted linears; returns how many."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in root.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and id(module) not in inside:
            layers = [layer for layer in dict.fromkeys(module) if _is_layer(layer)]
            count = Counter(type(layer) for layer in layers)
            equal = [layer for layer in layers if count[type(layer)] >= _LEAST]
            inside.update(id(inner) for layer in equal for inner in layer.modules())
            found += [layer for layer in equal if not hasattr(layer, ORIGINAL)]
    for layer in found:
        layer.__class__ = marked_class(type(layer))  # type: ignore[arg-type]
    return sum(hasattr(layer, ORIGINAL) for layer in found)


def _is_layer(module: nn.Module) -> bool:
    """Whether it holds adapted linears and has a forward of its own."""
    if isinstance(module, (QLoRALinear, nn.ModuleList, nn.Sequential)) or "forward" in module.__dict__:
        return False
    return any(isinstance(inner, QLoRALinear) for inner in module.modules())


@functools.cache
def marked_class(cls: Any) -> type[nn.Module]:
    """The class of a marked layer; `cls` itself where this torch's Dynamo cannot trace one layer for others."""
    from . import layer_tracing

    if not layer_tracing.register():
        return cls
    # code of its own for each class: Dynamo counts recompilations by code
    forward = types.FunctionType(_forward.__code__.replace(), _forward.__globals__, "forward")
    functools.update_wrapper(forward, cls.forward)
    body = {"forward": forward, ORIGINAL: cls.forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return edited_class(cls.__name__, (cls,), body | {"__doc__": cls.__doc__}, marked_class, cls)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return equal_layer(self, *args, **kwargs)
    return self._qlora_layer_forward(*args, **kwargs)
