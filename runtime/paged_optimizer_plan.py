"""What a sweep over pages works on, and the kernel's table of it: which piece of which parameter lies where in a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernels.cpu_common import DTYPES
from .memory import Page
from .paged_optimizer_layout import ParamState


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


class Plan:
    """Which spans lie in which page, for one list of states: the same at every step, so made once.

    Arrays have one entry per span, in the order of pages: `task` (index into the tasks), `start` (bytes into the
    parameter), `page` (index into the pages), `offset` (bytes into it), `count` (elements), `dtype`, `narrow`.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.states = [task.state for task in tasks]
        spans = [(span.page.number, index, span) for index, task in enumerate(tasks) for span in task.state.spans]
        spans.sort(key=lambda entry: entry[:2])
        self.spans = [span for _, _, span in spans]
        self.pages = list(dict.fromkeys(span.page for span in self.spans))
        self.index = {page: index for index, page in enumerate(self.pages)}
        self.page = np.array([self.index[span.page] for span in self.spans])
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
        self._order: tuple[object, Order] | None = None  # the last one, and what it was for

    def fits(self, tasks: Sequence[Task]) -> bool:
        """Whether these are the tasks that it was made for."""
        return len(tasks) == len(self.states) and all(t.state is s for t, s in zip(tasks, self.states))

    def order(self, windows: Sequence[Sequence[Page]], late: bool) -> Order:
        """The pieces as a table has them for these windows; `late`: see Table."""
        wanted = late, [[page.number for page in pages] for pages in windows]
        if self._order is None or self._order[0] != wanted:
            self._order = wanted, self._new_order(windows, late)
        return self._order[1]

    def _new_order(self, windows: Sequence[Sequence[Page]], late: bool) -> Order:
        window = np.empty(len(self.pages), dtype=np.int64)
        for number, pages in enumerate(windows):
            window[[self.index[page] for page in pages]] = number
        key = window[self.page] * 6 + self.narrow * 3 + (self.dtype if late else 0)
        at = np.argsort(key, kind="stable")
        first = np.flatnonzero(np.diff(key[at], prepend=-1))  # rows of equal keys are one call
        last, most = [*first[1:].tolist(), len(key)], np.maximum.reduceat(self.count[at], first).tolist()
        calls: list[list[Call]] = [[] for _ in windows]
        for begin, end, longest, of in zip(first.tolist(), last, most, key[at][first].tolist()):
            calls[of // 6].append(Call(begin, end, of % 6 >= 3, (of % 3, longest) if late else ()))
        table = np.zeros((len(key), 6), dtype=np.int64)
        table[:, 0] = table[:, 1] = self.start[at]
        table[:, 2], table[:, 3] = self.offset[at], self.count[at]
        table[:, 5] = 0 if late else self.dtype[at]
        page = self.page[at]
        first = np.flatnonzero(np.diff(key[at] * len(self.pages) + page, prepend=-1))
        runs: list[list[Run]] = [[] for _ in windows]
        for begin, end in zip(first.tolist(), [*first[1:].tolist(), len(key)]):
            runs[key[at[begin]] // 6].append(Run(int(page[begin]), begin, end))
        return Order(self.task[at], page, table, calls, runs)


class Call(NamedTuple):
    """Rows `first` to `last` of a table; `form` is empty, or the parameters' dtype and the elements of the longest."""

    first: int
    last: int
    narrow: bool
    form: tuple[int, ...]


class Run(NamedTuple):
    """Rows `first` to `last` of a table are of one page (its index)."""

    page: int
    first: int
    last: int


class Order(NamedTuple):
    """By row of a table its task and its page (by index), what of the row no step changes; by window its calls and runs."""

    task: np.ndarray
    page: np.ndarray
    table: np.ndarray
    calls: list[list[Call]]
    runs: list[list[Run]]


class Rows(NamedTuple):
    """What one call takes of the table; `form`: see Call, and behind it, for a GPU, the rows' places."""

    pieces: Tensor
    narrow: bool
    form: tuple[Any, ...]


class Table:
    """struct Piece of the kernel, a row for each piece of a sweep, those of a window side by side; `numbers` are its rows of
    coefficients.

    For a GPU (`late`) a call has pieces of one dtype, in whose place stands the address of the gradient's sum, and the
    table goes there before the pages begin to. Where a page comes to lie is known when the host has asked for it: the
    kernel reads that from the host's pinned memory. A copy would wait behind those of the next pages, and they then for
    what is made of this one; a kernel that adds it would cost the host as much as a page's copy.
    """

    def __init__(
        self, plan: Plan, tasks: Sequence[Task], windows: Sequence[Sequence[Page]], device: torch.device, late: bool
    ) -> None:
        self._plan, self._order, self._late = plan, plan.order(windows, late), late
        numbers = {task.numbers: None for task in tasks}
        task, on_gpu, (rows, fields) = self._order.task, device.type == "cuda", self._order.table.shape
        size, sent = rows * fields, rows * fields + 4 * len(numbers)  # 8 fp32 are as long as 4 of these
        # one piece of memory: the copy of the table is what keeps it from being used again before the kernels have read it
        memory = torch.empty(sent + rows * 2, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._places = memory[sent:].view(rows, 2)  # two: each row begins at a multiple of 16 bytes
        there = torch.empty_like(memory[:sent], device=device) if on_gpu else memory
        self._there = there[:size].view(rows, fields)
        self.numbers = there[size:sent].view(torch.float32).view(len(numbers), 8)
        memory[size:sent].numpy().view(np.float32)[:] = [x for key in numbers for x in (*key, 0.0)]
        array = memory[:size].numpy().reshape(rows, fields)
        array[:] = self._order.table
        row_of = {key: row for row, key in enumerate(numbers)}
        given = [(t.values.data_ptr(), t.gradient.data_ptr(), row_of[t.numbers]) for t in tasks]
        sources = np.array(given, dtype=np.int64)[task]
        array[:, :2] += sources[:, :2]
        array[:, 4] = sources[:, 2]
        if late:
            totals = [0 if t.total is None else t.total.data_ptr() for t in tasks]
            array[:, 5] = np.array(totals, dtype=np.int64)[task]
        buffers = [page.buffer for page in plan.pages]  # of those that are here now
        self._bases = [0 if buffer is None else buffer.data_ptr() for buffer in buffers]
        bases = np.array(self._bases, dtype=np.int64)[self._order.page]
        array[:, 2] = np.where(bases == 0, 0, bases + self._order.table[:, 2])
        self._addresses = self._places.numpy()[:, 0] if late else array[:, 2]
        if on_gpu:
            there.copy_(memory[:sent], non_blocking=True)
        # split here, by one call: a slice costs the host more than a microsecond, and then a copy may wait for it
        sizes = [call.last - call.first for calls in self._order.calls for call in calls]
        parts = zip(self._there.split(sizes), self._places.split(sizes))
        self._calls = [[self._rows(call, *next(parts)) for call in calls] for calls in self._order.calls]

    def _rows(self, call: Call, pieces: Tensor, places: Tensor) -> Rows:
        return Rows(pieces, call.narrow, (*call.form, places) if self._late else call.form)

    def calls(self, number: int) -> Sequence[Rows]:
        """Those of a window, whose pages are on the device, or on their way, by now."""
        for page, first, last in self._order.runs[number]:
            buffer = self._plan.pages[page].buffer
            assert buffer is not None
            address = buffer.data_ptr()
            if address == self._bases[page]:
                continue
            if self._late and self._bases[page]:  # it was here, and lies elsewhere now
                self._there[first:last, 2].zero_()
            self._addresses[first:last] = self._order.table[first:last, 2] + address
        return self._calls[number]
