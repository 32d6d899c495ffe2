"""Which paged optimizers have parameters of a graph, in the terms that the pass over the backward graph knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..page_ops import pager_of
from ..page_plan import FILE_COPY, SPEEDS, PagedParameter, PageLink, PlannedOptimizer, Speeds
from .memory.budget import page_bytes_for
from .paged_backward import BackwardPager
from .paged_optimizer_layout import layout_for

_STATE_PAGES = 4  # beside the gradients there must be room for pages to work on and pages to come
_CLASSES = {"paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW", "paged_lion": "PagedLion"}


@dataclass(frozen=True)
class _Optimizer:
    """What a plan has to know of an optimizer; `pager` is its number, -1 for one that is only planned."""

    pager: int
    name: str
    in_all: int
    lion: bool
    state_bits: int
    step_in_backward: bool
    budget: int | None
    page_bytes: int
    speeds: Speeds


def page_links(inputs: Mapping[int, tuple[str, Tensor]]) -> tuple[PageLink, ...]:
    """Inputs of a graph, position -> (name, tensor)  ->  one link for each paged optimizer that has some of them."""
    found: dict[int, tuple[BackwardPager, dict[int, tuple[str, Tensor]]]] = {}
    for position, (name, tensor) in inputs.items():
        pager = pager_of(tensor) if tensor.requires_grad else None
        if isinstance(pager, BackwardPager) and not (pager.optimizer.step_in_backward and _has_hooks(tensor)):
            found.setdefault(pager.number, (pager, {}))[1][position] = (name, tensor)
    links = []
    for pager, parameters in found.values():
        numbers = {position: pager.number_of(tensor) for position, (_, tensor) in parameters.items()}
        links.append(_link(_described(pager), numbers, parameters))
    return tuple(links)


def _has_hooks(tensor: Tensor) -> bool:
    """Whether somebody wants to see or change its gradient, which must then leave the graph."""
    return bool(tensor._backward_hooks)


def planned_link(
    optimizer: PlannedOptimizer, inputs: Mapping[int, tuple[str, Tensor]], numbers: Mapping[int, int], device: str
) -> PageLink:
    """The link of an optimizer that is not there yet; `numbers`: the place of each input's parameter in it."""
    bits = 8 if optimizer.name.endswith("8bit") else 32
    described = _Optimizer(
        -1, _CLASSES[optimizer.name], len(numbers), optimizer.name == "paged_lion", bits, optimizer.step_in_backward,
        optimizer.budget, page_bytes_for(optimizer.budget), SPEEDS.get(device, SPEEDS["cpu"]),
    )  # fmt: skip
    return _link(described, numbers, inputs)


def _described(pager: BackwardPager) -> _Optimizer:
    optimizer = pager.optimizer
    pool = optimizer.pool
    speeds = SPEEDS.get(pool.device.type, SPEEDS["cpu"])
    if pool.has_file:
        speeds = Speeds(speeds.flops, speeds.memory, FILE_COPY)
    return _Optimizer(
        pager.number, type(optimizer).__name__, pager.size, optimizer.lion, optimizer.state_bits, optimizer.step_in_backward,
        pool.budget, pool.page_bytes, speeds,
    )  # fmt: skip


def _link(optimizer: _Optimizer, numbers: Mapping[int, int], inputs: Mapping[int, tuple[str, Tensor]]) -> PageLink:
    sizes = {position: _bytes(tensor) for position, (_, tensor) in inputs.items()}
    in_pages = not optimizer.step_in_backward and _gradients_fit(optimizer, list(sizes.values()))
    parameters = {}
    for position, (name, tensor) in inputs.items():
        layout = layout_for(tensor, lion=optimizer.lion, state_bits=optimizer.state_bits)
        state = -(-tensor.numel() // layout.unit) * layout.item_bytes
        paged = optimizer.step_in_backward or (
            in_pages and sizes[position] <= optimizer.page_bytes and tensor.is_contiguous()
        )
        parameters[position] = PagedParameter(numbers[position], name, state, sizes[position] if paged else 0)
    return PageLink(
        optimizer.pager,
        optimizer.name,
        optimizer.in_all,
        parameters,
        optimizer.step_in_backward,
        optimizer.budget,
        optimizer.page_bytes,
        optimizer.speeds,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gradients_fit(optimizer: _Optimizer, sizes: list[int]) -> bool:
    """First fit leaves at most half of a page unused where nothing is larger than that; beside it pages of state."""
    if optimizer.budget is None:
        return False
    page = optimizer.page_bytes
    small = [size for size in sizes if size <= page]
    pages = sum(1 if 2 * size > page else 2 * size / page for size in small)
    return (pages + _STATE_PAGES) * page <= optimizer.budget
