"""One optimizer step over pages: those on the device first, the next ones on their way meanwhile.

A generated kernel (C++ on the CPU, Triton on a GPU) updates all pieces of the pages at hand in one call; where there is
none, torch's own operators do it on views of the pages.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import MemoryBudgetError, ModelStateError
from . import kernels
from .memory import Page, PagePool, Span
from .memory.page import Where
from .paged_optimizer_layout import Views, dequantize_blocks, map_on, quantize_blocks, signed_map
from .paged_optimizer_plan import Numbers, Plan, Table, Task

_WINDOWS = 4  # pages at work, pages coming, and pages that the last window has not left yet


def defers(pool: PagePool) -> bool:
    """Whether the kernel itself looks at gradients' sums: asking a GPU for one waits for all that it has to do."""
    return pool.device.type == "cuda" and kernels.find("paged_step", pool.device.type) is not None


def sweep(pool: PagePool, tasks: Sequence[Task], plan: Plan) -> None:
    """Update every task's parameter and state. Raises MemoryBudgetError before anything is changed; ModelStateError where
    the device's memory is taken by others while pages change places, and some parameters are updated already. The caller
    holds `pool.steady`."""
    pool.reserve(list(plan.pieces))
    kernel = kernels.find("paged_step", pool.device.type)
    # What is there is used before it has to make room for what is not.
    order = sorted(plan.pieces, key=lambda page: (page.where is not Where.DEVICE, page.number))
    away = deque(page for page in order if page.where is Where.HOST)
    windows = list(_windows(pool, order))
    table = Table(plan, tasks, windows, pool.device, defers(pool)) if kernel is not None and windows else None
    for number, window in enumerate(windows):
        with _at_work(pool, window, number):
            fetch(pool, away, len(window))
            if kernel is not None and table is not None:
                for rows in table.calls(number):
                    kernel(rows.pieces, table.numbers, tasks[0].state.layout.lion, rows.narrow, *rows.form)
            else:
                for at in (at for page in window for at in plan.pieces[page]):
                    update_reference(tasks[plan.task[at]], plan.spans[at])
        if away:
            pool.evict(window, keep_spare=True)  # before what has not had its turn


@contextmanager
def _at_work(pool: PagePool, window: Sequence[Page], number: int) -> Iterator[None]:
    """`pool.on_device`, of the window with this number."""
    try:
        pool.acquire(window)
    except MemoryBudgetError as error:
        if number == 0:
            raise
        raise ModelStateError(
            f"A step ended when some parameters were updated and others were not: {error} Go on from a checkpoint."
        ) from error
    try:
        yield
    finally:
        pool.release(window)


def fetch(pool: PagePool, away: deque[Page], most: int | None = None) -> None:
    """Prefetch the first pages of `away`, at most so many, and take them off; into free room only, for what waits for
    its turn on the device must not have to leave for what comes after it."""
    while away and away[0].where is not Where.HOST:
        away.popleft()
    for _ in range(pool.prefetch(itertools.islice(away, most), displace=False)):
        away.popleft()


def _windows(pool: PagePool, pages: Sequence[Page]) -> Iterator[Sequence[Page]]:
    room = pool.unheld_bytes()  # gradients may lie in pages too
    size = len(pages) if room is None else max(1, room // pool.page_bytes // _WINDOWS)
    for start in range(0, len(pages), max(1, size)):
        yield pages[start : start + size]


def update_reference(task: Task, span: Span) -> None:
    """The meaning of the kernel, in torch operators on views of the page."""
    layout, numel = task.state.layout, task.state.numel
    views = layout.views(span, numel)
    start = span.first * layout.unit
    part = slice(start, start + layout.count(span, numel))
    values, gradient = task.values.detach().view(-1)[part], task.gradient.detach().view(-1)[part].float()
    target = values
    if layout.master:  # one that does not round to its parameter any more is of before somebody wrote into that
        target = views["master"]
        target.copy_(torch.where(target.to(values.dtype) == values, target, values.float()))
    moments = _decoded(views) if layout.narrow else views
    if layout.lion:
        _lion(target, gradient, moments["first"], task.numbers)
    else:
        _adamw(target, gradient, moments["first"], moments["second"], task.numbers)
    if layout.narrow:
        for field, value in moments.items():
            codes, scales = quantize_blocks(value, signed=signed_map(field))
            views[field].copy_(codes)
            views[f"{field} scales"].copy_(scales)
    if layout.master:
        values.copy_(target)


def _decoded(views: Views) -> Views:
    fields = [field for field in views if f"{field} scales" in views]
    return {
        f: dequantize_blocks(views[f], views[f"{f} scales"], map_on(signed_map(f), views[f].device)) for f in fields
    }


def _adamw(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, n: Numbers) -> None:
    values.mul_(n.decay)
    first.lerp_(gradient, n.weight)
    second.mul_(n.beta2).addcmul_(gradient, gradient, value=n.weight2)
    values.addcdiv_(first, (second.sqrt() / n.correction).add_(n.eps), value=n.negative_step)


def _lion(values: Tensor, gradient: Tensor, first: Tensor, n: Numbers) -> None:
    update = (first * n.correction).add_(gradient * n.weight)
    values.mul_(n.decay).add_(update.sign_(), alpha=n.negative_step)
    first.mul_(n.beta2).add_(gradient * n.weight2)
