"""Which paged optimizers have parameters of a graph, in the terms that the pass over the backward graph knows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..page_ops import pager_of
from ..page_plan import FILE_COPY, SPEEDS, PagedParameter, PageLink, Speeds
from .memory import PagePool
from .paged_backward import BackwardPager
from .paged_optimizer_layout import layout_for

_STATE_PAGES = 4  # beside the gradients there must be room for pages to work on and pages to come


def page_links(inputs: Mapping[int, tuple[str, Tensor]]) -> tuple[PageLink, ...]:
    """Inputs of a graph, position -> (name, tensor)  ->  one link for each paged optimizer that has some of them."""
    found: dict[int, tuple[BackwardPager, dict[int, tuple[str, Tensor]]]] = {}
    for position, (name, tensor) in inputs.items():
        pager = pager_of(tensor) if tensor.requires_grad else None
        if isinstance(pager, BackwardPager):
            found.setdefault(pager.number, (pager, {}))[1][position] = (name, tensor)
    return tuple(_link(pager, parameters) for pager, parameters in found.values())


def _link(pager: BackwardPager, inputs: Mapping[int, tuple[str, Tensor]]) -> PageLink:
    optimizer = pager.optimizer
    pool = optimizer.pool
    sizes = {position: _bytes(tensor) for position, (_, tensor) in inputs.items()}
    in_pages = not optimizer.step_in_backward and _gradients_fit(pool, list(sizes.values()))
    parameters = {}
    for position, (name, tensor) in inputs.items():
        layout = layout_for(tensor, lion=optimizer.lion, state_bits=optimizer.state_bits)
        state = -(-tensor.numel() // layout.unit) * layout.item_bytes
        paged = optimizer.step_in_backward or (
            in_pages and sizes[position] <= pool.page_bytes and tensor.is_contiguous()
        )
        parameters[position] = PagedParameter(pager.number_of(tensor), name, state, sizes[position] if paged else 0)
    speeds = SPEEDS.get(pool.device.type, SPEEDS["cpu"])
    if pool.has_file:
        speeds = Speeds(speeds.flops, speeds.memory, FILE_COPY)
    return PageLink(
        pager.number,
        type(optimizer).__name__,
        parameters,
        optimizer.step_in_backward,
        pool.budget,
        pool.page_bytes,
        speeds,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gradients_fit(pool: PagePool, sizes: list[int]) -> bool:
    """First fit leaves at most half of a page unused where nothing is larger than that; beside it pages of state."""
    if pool.budget is None:
        return False
    small = [size for size in sizes if size <= pool.page_bytes]
    pages = sum(1 if 2 * size > pool.page_bytes else 2 * size / pool.page_bytes for size in small)
    return (pages + _STATE_PAGES) * pool.page_bytes <= pool.budget
