"""One optimizer step over pages: those on the device first, the next ones on their way meanwhile.

A generated kernel (C++ on the CPU, Triton on a GPU) updates all pieces of the pages at hand in one call; where there is
none, torch's own operators do it on views of the pages.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import MemoryBudgetError, ModelStateError
from . import kernels
from .kernels.cpu_common import DTYPES
from .kernels.triton_common import sent_to
from .memory import Page, PagePool, Span
from .memory.page import Where
from .paged_optimizer_layout import ParamState, Views, dequantize_blocks, map_on, quantize_blocks, signed_map

_WINDOWS = 4  # pages at work, pages coming, and pages that the last window has not left yet


class Numbers(NamedTuple):
    """What an update multiplies with, from a group's options and a step count. Row order: struct Numbers."""

    decay: float
    weight: float
    beta2: float
    weight2: float
    correction: float
    eps: float
    negative_step: float

    @classmethod
    def of(cls, group: dict[str, Any], step: int, *, lion: bool) -> Numbers:
        """In double precision, in the order of torch.optim.AdamW, so that rounding to fp32 gives the same numbers."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * group["weight_decay"]
        if lion:
            return cls(decay, 1 - beta1, beta2, 1 - beta2, beta1, 0.0, -lr)
        correction = (1 - beta2**step) ** 0.5
        return cls(decay, 1 - beta1, beta2, 1 - beta2, correction, group["eps"], -(lr / (1 - beta1**step)))


class Task(NamedTuple):
    """One parameter's update: its contiguous values and gradient, its state, its numbers; where `defers`, the gradient's
    fp32 sum, so that nothing is updated where that is not finite."""

    values: Tensor
    gradient: Tensor
    state: ParamState
    numbers: Numbers
    total: Tensor | None = None


def defers(pool: PagePool) -> bool:
    """Whether the kernel itself looks at gradients' sums: asking a GPU for one waits for all that it has to do."""
    return pool.device.type == "cuda" and kernels.find("paged_step", pool.device.type) is not None


class Plan:
    """Which spans lie in which page, for one list of states: the same at every step, so made once.

    Arrays have one entry per span, in the order of pages: `task` (index into the tasks), `start` (bytes into the
    parameter), `offset` (bytes into the page), `count` (elements), `dtype`, `narrow`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.states = [task.state for task in tasks]
        spans = [(span.page.number, index, span) for index, task in enumerate(tasks) for span in task.state.spans]
        spans.sort(key=lambda entry: entry[:2])
        self.spans = [span for _, _, span in spans]
        self.task = np.array([index for _, index, _ in spans])
        layouts = [state.layout for state in self.states]
        sizes = [task.values.element_size() for task in tasks]
        self.start = np.array([span.first * layouts[i].unit * sizes[i] for _, i, span in spans])
        self.offset = np.array([span.offset for span in self.spans])
        self.count = np.array([layouts[i].count(span, self.states[i].numel) for _, i, span in spans])
        self.dtype = np.array([DTYPES[tasks[i].values.dtype] for _, i, _ in spans])
        self.narrow = np.array([layouts[i].narrow for _, i, _ in spans])
        self.pieces: dict[Page, range] = {}
        for at, span in enumerate(self.spans):
            begin = self.pieces[span.page].start if span.page in self.pieces else at
            self.pieces[span.page] = range(begin, at + 1)

    def fits(self, tasks: Sequence[Task]) -> bool:
        """Whether these are the tasks that it was made for."""
        return len(tasks) == len(self.states) and all(t.state is s for t, s in zip(tasks, self.states))


def sweep(pool: PagePool, tasks: Sequence[Task], plan: Plan) -> None:
    """Update every task's parameter and state. Raises MemoryBudgetError before anything is changed; ModelStateError where
    the device's memory is taken by others while pages change places, and some parameters are updated already."""
    pool.reserve(list(plan.pieces))
    kernel = kernels.find("paged_step", pool.device.type)
    numbers = {task.numbers: None for task in tasks}
    rows = {key: row for row, key in enumerate(numbers)}
    sources = np.array([(t.values.data_ptr(), t.gradient.data_ptr(), rows[t.numbers]) for t in tasks], dtype=np.int64)
    coefficients = torch.tensor([(*key, 0.0) for key in numbers], dtype=torch.float32, device="cpu")
    coefficients = sent_to(pool.device, coefficients)
    totals = None
    if defers(pool):
        totals = torch.tensor([0 if t.total is None else t.total.data_ptr() for t in tasks], device="cpu")
    # What is there is used before it has to make room for what is not.
    order = sorted(plan.pieces, key=lambda page: (page.where is not Where.DEVICE, page.number))
    away = deque(page for page in order if page.where is Where.HOST)
    for number, window in enumerate(_windows(pool, order)):
        with _at_work(pool, window, number):
            fetch(pool, away, len(window))
            pieces = [at for page in window for at in plan.pieces[page]]
            if kernel is None:
                for at in pieces:
                    update_reference(tasks[plan.task[at]], plan.spans[at])
                continue
            for narrow in (False, True):
                chosen = np.array([at for at in pieces if plan.narrow[at] == narrow], dtype=np.int64)
                if chosen.size:
                    table = torch.from_numpy(_table(plan, chosen, sources))
                    own = () if totals is None else (totals[torch.from_numpy(plan.task[chosen])],)
                    kernel(table, coefficients, tasks[0].state.layout.lion, narrow, *own)
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


def _table(plan: Plan, chosen: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """struct Piece of the kernel, one row per span."""
    bases: dict[Page, int] = {}
    for at in chosen:
        page = plan.spans[at].page
        if page not in bases:
            assert page.buffer is not None
            bases[page] = page.buffer.data_ptr()
    task, start = plan.task[chosen], plan.start[chosen]
    table = np.empty((chosen.size, 6), dtype=np.int64)
    table[:, 0] = sources[task, 0] + start
    table[:, 1] = sources[task, 1] + start
    table[:, 2] = [bases[plan.spans[at].page] for at in chosen] + plan.offset[chosen]
    table[:, 3] = plan.count[chosen]
    table[:, 4] = sources[task, 2]
    table[:, 5] = plan.dtype[chosen]
    return table


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
