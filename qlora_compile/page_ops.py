"""The ops of a paged optimizer in a backward graph. Those without a result mutate a token: nothing drops or reorders them.

    prefetch_page     state of some parameters begins to come to the device, after `after` was computed
    accumulate_grad   gradients -> the same gradients, lying in pages
    step_page         gradients are used for one update of their parameters, and are gone
    evict_page        state of some parameters leaves the device

What they act on lives outside the graph: `pager` names the optimizer, `numbers` its parameters in the optimizer's order.
An optimizer that is gone makes them do nothing, `step_page` an error, as does a parameter that another one has taken over.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import ModelStateError


class Pager(Protocol):
    """What stands behind the ops."""

    def has(self, parameter: Tensor) -> bool:
        """Whether this very tensor is its, and no optimizer's that was made later."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to bring state in, as far as there is room."""

    def accumulate(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        """The same values in memory of their own, in pages where that can be."""

    def step(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """One update of each parameter."""

    def evict(self, numbers: Sequence[int]) -> None:
        """Send state out that nothing more in this backward pass needs."""


# attributes of a parameter: the number of the paged optimizer that has it, -1 without one; its own number in that
PAGER, NUMBER = "_qlora_pager", "_qlora_number"

_pagers: weakref.WeakValueDictionary[int, Pager] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_pager(pager: Pager) -> int:
    """The number that ops name it by from now on; it is held weakly."""
    number = next(_numbers)
    _pagers[number] = pager
    return number


def pager_of(parameter: Tensor) -> Pager | None:
    """The paged optimizer that was made last with this parameter, if it is alive. A copy of a parameter has none."""
    pager = _pagers.get(getattr(parameter, PAGER, -1))
    return pager if pager is not None and pager.has(parameter) else None


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = f"qlora::{schema.partition('(')[0]}"
    torch.library.define(name, schema.removeprefix(schema.partition("(")[0]), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", run)
    torch.library.register_fake(name, fake)


def _prefetch_page(token: Tensor, after: Sequence[Tensor], pager: int, numbers: Sequence[int]) -> None:
    found = _pagers.get(pager)
    if found is not None:
        found.prefetch(numbers)


def _accumulate_grad(gradients: Sequence[Tensor], pager: int, numbers: Sequence[int]) -> list[Tensor]:
    found = _pagers.get(pager)
    return [g.clone() for g in gradients] if found is None else found.accumulate(gradients, numbers)


def _step_page(
    token: Tensor, gradients: Sequence[Tensor], parameters: Sequence[Tensor], pager: int, numbers: Sequence[int]
) -> None:
    found = _pagers.get(pager)
    if found is None:
        raise ModelStateError(
            "This backward pass belongs to an optimizer with step_in_backward=True that is gone or was replaced after the "
            "forward pass: make the optimizer before the loss is computed."
        )
    found.step(gradients, numbers)


def _evict_page(token: Tensor, pager: int, numbers: Sequence[int]) -> None:
    found = _pagers.get(pager)
    if found is not None:
        found.evict(numbers)


def _nothing(*_: Any) -> None:
    """What the ops without a result are on fake tensors."""


_define("prefetch_page(Tensor(a!) token, Tensor[] after, int pager, int[] numbers) -> ()", _prefetch_page, _nothing)
_define(
    "accumulate_grad(Tensor[] gradients, int pager, int[] numbers) -> Tensor[]",
    _accumulate_grad,
    lambda gradients, pager, numbers: [torch.empty_like(g) for g in gradients],
)
_define(
    "step_page(Tensor(a!) token, Tensor[] gradients, Tensor(b!)[] parameters, int pager, int[] numbers) -> ()",
    _step_page,
    _nothing,
)
_define("evict_page(Tensor(a!) token, int pager, int[] numbers) -> ()", _evict_page, _nothing)
