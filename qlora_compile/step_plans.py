"""The plan of a training step at any batch and sequence length, from traces of a few.

One trace with odd symbols gives every size as a formula, as long as the same ops run for every length. Where they do not
(state-space models and linear attention work on chunks of a length, and pad to them), the batch alone is a symbol, and
every figure is the polynomial of second degree through those of three lengths: attention's are of no higher one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .config import QLoRAConfig
from .dynamo import quiet_fakes
from .errors import ModelStateError
from .interruption import deferred
from .memory_plan import MemoryPlan
from .positions import most_positions
from .step_plan import Symbols
from .tracing import keep_no_cache, meta_copy, trace

SYMBOLS = Symbols(7919, 100003)  # primes that divide no model's dimensions
LENGTHS = (256, 512, 768)  # multiples of what models work on at a time
_Name = TypeVar("_Name")
_NEAR = 0.02  # of all bytes: a length padded by a few, as it is for shifted labels, is no other formula


class StepPlans:
    """Of a language model with labels; every activation is kept. `device`: the kind it is for, as in `trace`."""

    def __init__(self, model: nn.Module, config: QLoRAConfig, device: str | None) -> None:
        self.model, self.config, self.device = meta_copy(model).train(), config, device
        keep_no_cache(self.model)

    @functools.cached_property
    def by_length(self) -> dict[int, MemoryPlan]:
        """Plans of three lengths; the key 0 alone where one has formulas for every length.

        Raises ModelStateError where the model cannot be traced, or has graph breaks.
        """
        symbols = symbols_for(self.model)
        if symbols is not None:
            return {0: self._plan(symbols)}
        return {length: self._plan(Symbols(SYMBOLS.batch, length, powers=1)) for length in lengths_for(self.model)}

    @functools.cached_property
    def chunk(self) -> int:
        """What lengths are padded to, as far as that takes memory: 8, 16, ... tokens."""
        lengths = lengths_for(self.model)
        known = {length: float(sum(_sizes(self.model, length))) for length in lengths}
        whole, chunk = lengths[0], 8
        while 2 * chunk <= whole:
            found = sum(_sizes(self.model, whole + chunk))
            if math.isclose(found, _fitted(known, whole + chunk), rel_tol=_NEAR):
                return chunk
            chunk *= 2
        return whole

    @property
    def one(self) -> MemoryPlan:
        """Any of them, for what no length changes."""
        return next(iter(self.by_length.values()))

    def _plan(self, symbols: Symbols) -> MemoryPlan:
        tokens = _tokens(symbols.batch, symbols.seq)
        plan = trace(self.model, tokens, self.config, symbols=symbols, device=self.device).plan
        if plan is None:
            raise ModelStateError(
                "The layers of this model do not run one after the other, so nothing can be estimated."
            )
        return plan

    def read(self, batch: int, seq: int, of: Callable[[MemoryPlan], Mapping[_Name, float]]) -> dict[_Name, float]:
        """Figures of a plan, by name, at this batch and length."""
        found = {length: of(plan.at(batch, length or seq)) for length, plan in self.by_length.items()}
        if 0 in found:
            return dict(found[0])
        seq = -(-seq // self.chunk) * self.chunk
        names = dict.fromkeys(name for figures in found.values() for name in figures)
        return {name: max(0.0, _fitted({s: f.get(name, 0) for s, f in found.items()}, seq)) for name in names}


def lengths_for(model: nn.Module) -> tuple[int, ...]:
    """LENGTHS, or shorter ones for a model of fewer positions."""
    most = _positions(model)
    return LENGTHS if most > LENGTHS[-1] else tuple(max(1, most * i // 4) for i in (1, 2, 3))


def symbols_for(model: nn.Module) -> Symbols | None:
    """Symbols in which every size of `model` (on the meta device) is a formula; None where its ops change with the length.

    The sequence is as long as the model takes one: some have a mask or a bias for each position.
    """
    most, lengths = _positions(model), lengths_for(model)[:2]
    try:
        known = [_sizes(model, length) for length in lengths]
    except RuntimeError:  # needs values: the trace is to say so
        return SYMBOLS
    if len({len(sizes) for sizes in known}) > 1:
        return None
    shorter = Symbols(SYMBOLS.batch, _prime_up_to(most), slack=0)
    for symbols in (SYMBOLS, *([shorter] if most < SYMBOLS.seq else [])):
        with contextlib.suppress(RuntimeError):  # it is longer than the model takes
            sizes = _sizes(model, symbols.seq)
            return symbols if _agree(symbols, sizes, lengths[-1], known[-1]) else None
    return SYMBOLS


def _positions(model: nn.Module) -> int:
    return most_positions(model) or SYMBOLS.seq


def _agree(symbols: Symbols, sizes: Sequence[int], length: int, known: Sequence[int]) -> bool:
    """Whether formulas made of `sizes` give the `known` ones of this length, all together."""
    formulas = (symbols.size(nbytes).at(symbols.batch, length) for nbytes in sizes)
    return len(sizes) == len(known) and math.isclose(sum(formulas), sum(known), rel_tol=_NEAR)


class _Sizes(TorchDispatchMode):
    """The bytes of every op's results, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [leaf.nbytes for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out


@deferred()
def _sizes(model: nn.Module, length: int) -> list[int]:
    with torch.no_grad(), quiet_fakes(), FakeTensorMode(allow_non_fake_inputs=True) as mode, _Sizes() as sizes:
        # fake, so that transformers asks no values of them
        model(**{name: mode.from_tensor(tokens) for name, tokens in _tokens(SYMBOLS.batch, length).items()})
    return sizes.found


def _tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": tokens, "labels": tokens}


def _prime_up_to(number: int) -> int:
    return next((n for n in range(number, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1))), 1)


def _fitted(points: Mapping[int, float], at: int) -> float:
    """The polynomial through the points (Lagrange's form)."""
    places: Sequence[int] = [*points]
    return sum(
        value * math.prod((at - other) / (place - other) for other in places if other != place)
        for place, value in points.items()
    )
