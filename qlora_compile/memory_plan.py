"""The life of every buffer over one training step: what is allocated when, how large, for which module.

A plan is read off the graphs that AOTAutograd made of a step (forward, then backward), storage by storage: views cost
nothing, what the forward saves lives until the backward has used it. Repeated layers are traced a few times and the
plan is unrolled to all of them. Sizes are monomials in batch and sequence length where the trace had symbols for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

KINDS = ("saved", "temporary", "workspace", "gradients", "output")


class Size(NamedTuple):
    """`coefficient * batch**b * seq**s`: bytes, or FLOPs. A plain number where nothing is symbolic.

    With `chunk` it is `coefficient` for each of so many rows at most: the rows are worked on in equal chunks.
    """

    coefficient: int
    b: int = 0
    s: int = 0
    chunk: int = 0

    def at(self, batch: int, seq: int) -> int:
        rows = batch**self.b * seq**self.s
        return self.coefficient * (chunk_rows(rows, self.chunk) if self.chunk else rows)


def chunk_rows(rows: int, most: int) -> int:
    """The rows of a chunk where as few equal chunks as `most` allows are made of them."""
    return -(-rows // -(-rows // most)) if rows else 1


class Rows(NamedTuple):
    """Bytes of a buffer with `rows` rows (tokens) of `row_bytes`, or with one chunk of them."""

    rows: int
    row_bytes: int
    chunk: int = 0


@dataclass(frozen=True)
class Event:
    """One executed node: its phase ("forward", "backward"), name, target and module; a view allocates nothing."""

    phase: str
    name: str
    target: str
    module: str
    allocates: bool = True
    flops: tuple[Size, ...] = ()
    traffic: tuple[Size, ...] = ()  # bytes that it reads and writes


@dataclass(frozen=True)
class Buffer:
    """One storage: alive from event `start` to event `end`, both included."""

    name: str
    module: str
    kind: str
    size: Size
    start: int
    end: int


@dataclass(frozen=True)
class Peak:
    """The largest sum of live buffers: where, how much, and of what kinds."""

    bytes: int
    event: int
    by_kind: dict[str, int]


@dataclass
class MemoryPlan:
    """Events in order, buffers over them, and `resident`: bytes that live through the whole step, by kind."""

    events: list[Event] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    resident: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, Size] = field(default_factory=dict)  # reused workspace that is never given back, by name
    batch: int = 1
    seq: int = 1

    def at(self, batch: int, seq: int) -> MemoryPlan:
        """The same plan for another batch and sequence length; only sizes that were symbols change."""
        return replace(self, batch=batch, seq=seq)

    def size(self, size: Size) -> int:
        return size.at(self.batch, self.seq)

    def resident_bytes(self) -> dict[str, int]:
        """What lives through the step, the reused workspace included."""
        scratch = sum(self.size(size) for size in self.scratch.values())
        return dict(self.resident) | ({"workspace": scratch} if scratch else {})

    def timeline(self) -> list[int]:
        """Bytes of live buffers at each event, without what is resident."""
        change = [0] * (len(self.events) + 1)
        for buffer in self.buffers:
            amount = self.size(buffer.size)
            change[buffer.start] += amount
            change[buffer.end + 1] -= amount
        total, line = 0, []
        for amount in change[:-1]:
            total += amount
            line.append(total)
        return line

    def peak(self, phase: str | None = None) -> Peak:
        """The peak over the step or over one phase, resident bytes included."""
        line = self.timeline()
        inside = [i for i, event in enumerate(self.events) if phase is None or event.phase == phase]
        resident = self.resident_bytes()
        if not inside:
            return Peak(sum(resident.values()), 0, resident)
        top = max(inside, key=lambda i: line[i])
        by_kind: dict[str, int] = dict(resident)
        for buffer in self.live_at(top):
            by_kind[buffer.kind] = by_kind.get(buffer.kind, 0) + self.size(buffer.size)
        return Peak(sum(by_kind.values()), top, by_kind)

    def live_at(self, event: int) -> list[Buffer]:
        """The buffers alive at an event, largest first."""
        live = [buffer for buffer in self.buffers if buffer.start <= event <= buffer.end]
        return sorted(live, key=lambda buffer: -self.size(buffer.size))

    def saved_bytes(self) -> int:
        """What the forward keeps for the backward."""
        return sum(self.size(buffer.size) for buffer in self.buffers if buffer.kind == "saved")

    def total(self, of: Callable[[Event], Iterable[Size]], phase: str | None = None) -> int:
        return sum(self.size(s) for e in self.events if phase in (None, e.phase) for s in of(e))

    def flops(self, phase: str | None = None) -> int:
        """Floating-point operations of the step's products and attention, or of one phase's."""
        return self.total(lambda event: event.flops, phase)

    def traffic(self, phase: str | None = None) -> int:
        """Bytes that the nodes read and write, each counted by itself (before any fusion)."""
        return self.total(lambda event: event.traffic, phase)


class Run(NamedTuple):
    """Where the events of the traced units lie in one phase: the first event of unit 0, 1, 2 and the end, in order."""

    starts: tuple[int, ...]
    units: tuple[int, ...]  # the units in the order in which they run: 0, 1, 2 forward, 2, 1, 0 backward
    end: int


def unroll(
    plan: MemoryPlan, unit_of: Callable[[str], int | None], times: int, rename: Callable[[str, int], str]
) -> MemoryPlan | None:
    """The plan of three traced units -> the plan of `times` units: the middle one stands for all but the first and last.

    `unit_of(module)` tells the traced unit; `rename(module, unit)` is a traced module's name in the unit it stands for.
    None where the units' events are not three runs one after the other: then repetition says nothing about memory.
    """
    runs = [run for phase in ("forward", "backward") if (run := _run(plan, phase, unit_of)) is not None]
    if not runs or any(run.units not in ((0, 1, 2), (2, 1, 0)) for run in runs):
        return None
    return _Unrolled(plan, runs, times, unit_of, rename).plan()


def _run(plan: MemoryPlan, phase: str, unit_of: Callable[[str], int | None]) -> Run | None:
    starts: dict[int, int] = {}
    last = 0
    for index, event in enumerate(plan.events):
        # products only: what is cheap is moved about, such as the rotary embedding that the backward computes again
        unit = unit_of(event.module) if event.phase == phase and event.flops else None
        if unit is not None:
            starts.setdefault(unit, index)
            last = index
    order = tuple(sorted(starts, key=lambda unit: starts[unit]))
    return Run(tuple(starts[unit] for unit in order), order, last + 1) if starts else None


class _Unrolled:
    """The arithmetic of `unroll`: a traced event of the middle unit stands for `times - 2` events."""

    def __init__(
        self,
        plan: MemoryPlan,
        runs: list[Run],
        times: int,
        unit_of: Callable[[str], int | None],
        rename: Callable[[str, int], str],
    ) -> None:
        self.traced, self.runs, self.times, self.unit_of, self.rename = plan, runs, times, unit_of, rename
        self.copies = times - 2
        self.events: list[Event] = []
        self.place: dict[tuple[int, int], int] = {}  # (traced event, unit it is executed for) -> event
        self._lay_out()

    def _run_of(self, event: int) -> tuple[Run, int] | None:
        """(the run, the position of the unit in its order) that an event belongs to."""
        for run in self.runs:
            if run.starts[0] <= event < run.end:
                return run, sum(start <= event for start in run.starts) - 1
        return None

    def unit(self, event: int) -> int | None:
        found = self._run_of(event)
        return None if found is None else found[0].units[found[1]]

    def _lay_out(self) -> None:
        index = 0
        while index < len(self.traced.events):
            found = self._run_of(index)
            unit = None if found is None else found[0].units[found[1]]
            if found is None or unit != 1:
                self._emit(index, {None: 0, 0: 0, 2: self.times - 1}[unit])
                index += 1
                continue
            run, position = found
            stop = run.starts[position + 1]
            middle = range(1, self.times - 1)
            for real in middle if run.units[0] == 0 else reversed(middle):
                for inner in range(index, stop):
                    self._emit(inner, real)
            index = stop

    def _emit(self, traced: int, real: int) -> None:
        event = self.traced.events[traced]
        self.place[traced, real] = len(self.events)
        self.events.append(replace(event, module=self._renamed(event.module, self.unit(traced), real)))

    def _renamed(self, module: str, unit: int | None, real: int) -> str:
        """A run starts at a unit's first product, so the norm before it stands in the run of the unit before."""
        named = self.unit_of(module)
        if named is None:
            return module
        wanted = {0: 0, 1: 1, 2: self.times - 1}[named] if unit is None else real + named - unit
        return self.rename(module, min(max(wanted, 0), self.times - 1))

    def end_of(self, buffer: Buffer, real: int) -> int:
        """Where the copy of a buffer that is made in unit `real` ends."""
        born, dies = self.unit(buffer.start), self.unit(buffer.end)
        last = self.times - 1
        if dies is None:
            return self.place[buffer.end, 0]
        if born is None:
            goal = {0: 0, 1: 1 if self._is_backward(buffer.end) else last - 1, 2: last}[dies]
        elif born == 1 or dies == 1:
            goal = real + dies - born
        else:
            goal = 0 if dies == 0 else last
        return self._at(buffer.end, min(max(goal, 0), last))

    def _is_backward(self, event: int) -> bool:
        return self.traced.events[event].phase == "backward"

    def _at(self, traced: int, real: int) -> int:
        """The event of unit `real` that answers to a traced one, which may stand in another unit: by its offset."""
        if (traced, real) in self.place:
            return self.place[traced, real]
        found = self._run_of(traced)
        assert found is not None
        run, position = found
        wanted = 0 if real == 0 else 2 if real == self.times - 1 else 1
        other = run.units.index(wanted)
        stop = run.starts[other + 1] if other + 1 < len(run.starts) else run.end
        moved = min(run.starts[other] + traced - run.starts[position], stop - 1)
        return self.place[moved, real]

    def plan(self) -> MemoryPlan:
        buffers = []
        for buffer in self.traced.buffers:
            unit = self.unit(buffer.start)
            for real in range(1, self.times - 1) if unit == 1 else [{None: 0, 0: 0, 2: self.times - 1}[unit]]:
                module = self._renamed(buffer.module, unit, real)
                start = self.place[buffer.start, real]
                buffers.append(replace(buffer, module=module, start=start, end=max(start, self.end_of(buffer, real))))
        return replace(self.traced, events=self.events, buffers=buffers)


def merge_resident(*parts: Mapping[str, int]) -> dict[str, int]:
    """The sum of several resident accounts, kinds of no bytes left out."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, 0) + amount
    return {kind: amount for kind, amount in total.items() if amount}
