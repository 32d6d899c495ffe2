"""The states of a paged optimizer's parameters: made at their first gradient, freed with them, in the pages of a pool."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..errors import MemoryBudgetError, QLoRACompileError
from .memory import PagePool
from .paged_optimizer_checks import check_place
from .paged_optimizer_layout import ParamState, Views, layout_for
from .paged_optimizer_plan import Plan, Task
from .sharded import local_part


class StateTable:
    """Parameter -> ParamState. Pages are shared only by parameters of one group that were first used in one `generation`.

    Whole states only: one without its master copy would be taken for one. Plans of sweeps are kept as long as states are.
    """

    def __init__(self, pool: PagePool, *, lion: bool, state_bits: int) -> None:
        self._pool, self._lion, self._bits = pool, lion, state_bits
        self._states: dict[int, ParamState] = {}  # by id: a lookup by tensor costs more than its update
        self._plans: dict[tuple[int, ...], Plan] = {}  # by the parameters' numbers; () for all that have a gradient
        self.generation = 0

    def get(self, parameter: object) -> ParamState | None:
        return self._states.get(id(parameter))

    def add(self, parameter: Tensor, group: object) -> ParamState:
        """A new state, of zeros and where there is one of the master. Raises MemoryBudgetError, ModelStateError."""
        state = self._states[id(parameter)] = self._made(parameter, group)
        return state

    def _made(self, parameter: Tensor, group: object) -> ParamState:
        check_place(parameter, self._pool.device)
        mine = local_part(parameter)  # of a parameter that FSDP2 split, each rank keeps the state of its rows
        layout = layout_for(mine, lion=self._lion, state_bits=self._bits)
        items = -(-mine.numel() // layout.unit)
        allocation = self._pool.allocate(parameter, items, layout.item_bytes, (self.generation, group))
        key, table = id(parameter), weakref.ref(self)

        def forget(owner: weakref.ref) -> None:
            there = table()
            if there is not None and key in there._states and there._states[key].owner is owner:
                del there._states[key]

        state = ParamState(layout, mine.numel(), allocation, weakref.ref(parameter, forget), mine.dtype)
        if layout.master:
            try:
                state.write(self._pool, {"master": mine.detach().float().contiguous().view(-1)})
            except MemoryBudgetError:
                self._pool.free(allocation)
                raise
        return state

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What was added in this block is taken away again where it ends with one of our errors."""
        known = set(self._states)
        try:
            yield
        except QLoRACompileError:
            self.free(set(self._states) - known)
            raise

    def fill(self, loaded: dict[Tensor, tuple[int, Views]]) -> None:
        """These (step, values) in the place of everything. Raises as `add`, with nothing changed."""
        states: dict[Tensor, ParamState] = {}
        try:
            for parameter in loaded:
                states[parameter] = self._of_its_form(parameter) or self._made(parameter, 0)
            self._pool.reserve([span.page for state in states.values() for span in state.spans])
        except QLoRACompileError:
            for parameter, state in states.items():
                if state is not self.get(parameter):
                    self._pool.free(state.allocation)
            raise
        for parameter, (step, values) in loaded.items():
            states[parameter].step = step
            states[parameter].write(self._pool, values)
        self.free([key for key, state in self._states.items() if state not in states.values()])
        self._states |= {id(parameter): state for parameter, state in states.items()}
        self.generation += 1

    def _of_its_form(self, parameter: Tensor) -> ParamState | None:
        """Its state, unless that was made for another type or size."""
        mine, state = local_part(parameter), self.get(parameter)
        form = layout_for(mine, lion=self._lion, state_bits=self._bits), mine.numel(), mine.dtype
        return state if state is not None and (state.layout, state.numel, state.dtype) == form else None

    def free(self, keys: Iterable[int]) -> None:
        """Forget states, by their parameters' ids."""
        for key in [*keys]:
            self._pool.free(self._states.pop(key).allocation)
        self._plans.clear()

    def clear(self) -> None:
        """Forget them all."""
        self.free(self._states)

    def __iter__(self) -> Iterator[ParamState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def plan_for(self, tasks: Sequence[Task], numbers: tuple[int, ...], *, begins: bool) -> Plan:
        """The plan of these parameters, made once; where it is new and `begins`, a generation does."""
        plan = self._plans.get(numbers)
        if plan is None or not plan.fits(tasks):
            plan = self._plans[numbers] = Plan(tasks)
            self.generation += begins
        return plan
