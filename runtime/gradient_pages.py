"""Gradients in pages of the optimizer's pool: `.grad` is a view of its page, counted in the device budget.

A page of gradients stays on the device while one of its gradients is alive, and is never copied anywhere: with
`zero_grad` its contents are void. What somebody still holds then keeps its memory, and the page gets another one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import MemoryBudgetError
from .memory import Allocation, Page, PagePool
from .memory.pool import GRADIENTS


@dataclass
class _Held:
    """A page on the device, and the parameters whose gradients were put there."""

    parameters: list[nn.Parameter] = field(default_factory=list)


class GradientPages:
    """The gradients of one optimizer's parameters."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._places: dict[int, Allocation] = {}
        self._held: dict[Page, _Held] = {}

    def place(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """A copy of the gradient that autograd can make `parameter.grad`: in a page, or where that cannot be, elsewhere.

        Elsewhere: `parameter.grad` is there already and autograd adds to it; it is larger than a page; the budget is full.
        """
        size = gradient.numel() * gradient.element_size()
        fits = parameter.grad is None and gradient.is_contiguous() and 0 < size <= self._pool.page_bytes
        view = self._view(parameter, gradient) if fits and parameter.is_contiguous() else None
        return gradient.clone() if view is None else view.copy_(gradient)

    def _view(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        key = id(parameter)
        if key not in self._places:
            share = (GRADIENTS, gradient.dtype)
            self._places[key] = self._pool.allocate(parameter, gradient.numel(), gradient.element_size(), share)
        spans = self._places[key].spans
        if not spans:  # of a parameter that is gone, whose id this one has
            del self._places[key]
            return self._view(parameter, gradient)
        [span] = spans
        held = self._held.get(span.page)
        if held is not None and any(other is parameter for other in held.parameters):
            self._release(span.page)  # its gradient was dropped without our zero_grad
            held = self._held.get(span.page)
            if held is not None:
                return None  # others of the page are alive
        if held is None:
            try:
                self._pool.acquire([span.page])
            except MemoryBudgetError:
                return None
            held = self._held[span.page] = _Held()
        held.parameters.append(parameter)
        assert span.page.buffer is not None
        raw = span.page.buffer[span.offset : span.offset + gradient.numel() * gradient.element_size()]
        return raw.view(gradient.dtype).view(gradient.shape)

    def release(self) -> None:
        """Give back every page without a living gradient."""
        for page in list(self._held):
            self._release(page)

    def move_out(self) -> None:
        """Put living gradients elsewhere, for a step that needs all of the budget."""
        for page, held in list(self._held.items()):
            for parameter in held.parameters:
                if _lies_in(parameter.grad, page):
                    parameter.grad = parameter.grad.clone()  # type: ignore[union-attr]
            self._release(page)

    def _release(self, page: Page) -> None:
        if not any(_lies_in(parameter.grad, page) for parameter in self._held[page].parameters):
            del self._held[page]
            self._pool.release([page], wrote=False)
            self._pool.forget([page])

    @property
    def alive_bytes(self) -> int:
        """Of pages that hold gradients."""
        return sum(page.size for page in self._held)


def _lies_in(gradient: Tensor | None, page: Page) -> bool:
    if gradient is None or page.buffer is None or gradient.layout is not torch.strided:
        return False
    return gradient.untyped_storage().data_ptr() == page.buffer.untyped_storage().data_ptr()
