"""Lists of equal layers in a model: which layers repeat, and a model with a few of each kind in place of all.

    layers.0 ... layers.125 (equal)  ->  three of them traced: the first, one that stands for 124, the last

Two layers are equal if their classes, plain attributes, parameters, buffers and the configuration's decisions about them
are: shapes, ranks, targets. An attribute that holds each layer's own position (`layer_idx`) does not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

UNITS = 3  # the first, one that stands for all between, the last
MAX_PERIOD = 8
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Repeat:
    """`path` is a list of `total` layers: `head` odd ones, `units` equal runs of `period` layers, `tail` of the next."""

    path: str
    total: int
    head: int
    period: int
    traced_units: int = UNITS

    @property
    def units(self) -> int:
        return (self.total - self.head) // self.period

    @property
    def kept(self) -> list[int]:
        """Original indices of the layers that are traced, in the order in which they are."""
        dropped = range(self.head + self.period * (self.traced_units - 1), self.head + self.period * (self.units - 1))
        return [i for i in range(self.total) if i not in dropped]

    def unit_of(self, traced: int) -> int | None:
        """Which traced unit a traced layer belongs to; None for the head's and the tail's layers."""
        unit = (traced - self.head) // self.period
        return unit if traced >= self.head and unit < self.traced_units else None

    def originals(self, traced: int) -> list[int]:
        """The layers of the whole model that a traced layer stands for."""
        unit = self.unit_of(traced)
        dropped = (self.units - self.traced_units) * self.period
        if unit is None:
            return [traced if traced < self.head else traced + dropped]
        if unit == self.traced_units - 2:
            return [traced + self.period * i for i in range(self.units - self.traced_units + 1)]
        return [traced if unit < self.traced_units - 1 else traced + dropped]

    def split(self, name: str) -> tuple[str, int, str] | None:
        """`model.layers.1.mlp.up` -> (text before the index, 1, text after it), or None for a name that is not in it."""
        match = re.match(rf"((?:.*\.)?{re.escape(self.path)}\.)(\d+)(.*)", name)
        return (match[1], int(match[2]), match[3]) if match else None


def find_repeats(model: nn.Module, decision: Callable[[str], Any]) -> list[Repeat]:
    """The outermost lists of the model with more than three equal runs of layers.

    `decision(parameter's full name)` is what the configuration makes of it; layers with other decisions are not equal.
    """
    found: list[Repeat] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{repeat.path}.") for repeat in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and path and not inside:
            repeat = _repeat(path, _kinds(path, list(module), decision))
            if repeat is not None:
                found.append(repeat)
    return found


def _repeat(path: str, kinds: list[Any]) -> Repeat | None:
    """The head and period that leave the fewest layers to trace, or None where nothing is saved."""
    best: Repeat | None = None
    for period in range(1, MAX_PERIOD + 1):
        for head in range(len(kinds)):
            periodic = all(kinds[i] == kinds[i + period] for i in range(head, len(kinds) - period))
            repeat = Repeat(path, len(kinds), head, period)
            if periodic and repeat.units > UNITS and (best is None or len(repeat.kept) < len(best.kept)):
                best = repeat
    return best


def _kinds(path: str, layers: list[nn.Module], decision: Callable[[str], Any]) -> list[Any]:
    described = [dict(_description(f"{path}.{i}", layer, decision)) for i, layer in enumerate(layers)]
    positions = {
        key
        for key in (described[0] if described else ())
        if all(type(each.get(key)) is int and each[key] == i for i, each in enumerate(described))
    }
    return [{key: value for key, value in each.items() if key not in positions} for each in described]


def _description(path: str, layer: nn.Module, decision: Callable[[str], Any]) -> Iterable[tuple[str, Any]]:
    for name, module in layer.named_modules():
        yield f"{name}:class", type(module)
        for key, value in module.__dict__.items():
            if isinstance(value, _PLAIN):
                yield f"{name}.{key}", value
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full = ".".join(part for part in (path, name, key) if part)
                yield f"{name}.{key}:tensor", (tuple(tensor.shape), tensor.dtype, tensor.requires_grad, decision(full))


def fold_layers(model: nn.Module, repeats: Iterable[Repeat]) -> None:
    """Keep only the layers to trace, in place."""
    for repeat in repeats:
        layers: Any = model.get_submodule(repeat.path)
        kept = [layers[i] for i in repeat.kept]
        layers._modules.clear()
        layers._modules.update({str(i): layer for i, layer in enumerate(kept)})


def unfold_name(name: str, repeats: Iterable[Repeat]) -> list[str]:
    """A name in the traced model -> the names in the whole model that it stands for."""
    for repeat in repeats:
        parts = repeat.split(name)
        if parts is not None:
            return [f"{parts[0]}{index}{parts[2]}" for index in repeat.originals(parts[1])]
    return [name]
