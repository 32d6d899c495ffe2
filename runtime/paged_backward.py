"""What a paged optimizer does during the backward pass: the runtime behind the ops that `page_optimizer` inserts.

    compiled    the graph's prefetch_page, accumulate_grad, step_page and evict_page end up here
    eager       with step_in_backward, a hook on each parameter steps as soon as its gradient is accumulated

A parameter belongs to the optimizer that was made last with it; an earlier one goes on with plain `step()` calls, and
with step_in_backward not at all.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ModelStateError
from ..interruption import whole
from ..page_ops import NUMBER, PAGER, pager_of, register_pager
from .gradient_pages import GradientPages
from .memory import Page
from .paged_optimizer_checks import check_one_process
from .paged_optimizer_sweep import defers, fetch

if TYPE_CHECKING:
    from .paged_optimizer import PagedOptimizer

_AHEAD = 4  # parameters whose state an eager backward pass prefetches


class BackwardPager:
    """See `qlora_compile.page_ops.Pager`. `numbers` count the optimizer's parameters over its groups in order."""

    def __init__(self, optimizer: PagedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.planned = False  # a compiled backward pass prefetches what the step begins with
        self.gradients = GradientPages(optimizer.pool)
        self.number = register_pager(self)
        self._parameters: list[tuple[int, weakref.ref[nn.Parameter]]] = []  # (group, parameter), by number
        self._numbers: dict[int, int] = {}  # by id of a parameter that it has
        self.taken: set[int] = set()  # numbers of those that another optimizer has now
        self._handles: dict[int, Any] = {}  # hooks, by number
        self._stepped: dict[int, None] = {}  # in this backward pass, in order
        self._waiting: Counter[Page] = Counter()  # by page: parameters that were not stepped yet
        self._away: deque[Page] = deque()  # asked for when there was no room
        self._order: list[int] = []  # of the pass before
        self.skipped: list[int] = []  # gradients that were not finite
        self._passes = self._passes_before = 0  # compiled backward passes since the last step, and before it
        self._asked: set[int] = set()  # numbers that were to be prefetched in this pass
        self._totals: dict[int, Tensor] = {}  # sums of gradients that nobody has looked at yet
        weakref.finalize(self, _disown, self.number, self._parameters, self._handles).atexit = False

    @property
    def optimizer(self) -> PagedOptimizer:
        """Alive as long as anything calls this."""
        found = self._optimizer()
        assert found is not None
        return found

    def claim(self) -> None:
        """Take over all parameters of the optimizer: at its start, and for a new group."""
        known = len(self._parameters)
        groups = self.optimizer.param_groups
        flat = [(index, parameter) for index, group in enumerate(groups) for parameter in group["params"]]
        self._parameters[:] = [(index, weakref.ref(parameter)) for index, parameter in flat]
        for number, (_, parameter) in [*enumerate(flat)][known:]:
            before = pager_of(parameter)
            if isinstance(before, BackwardPager):
                before._let_go(parameter)
            setattr(parameter, PAGER, self.number)
            setattr(parameter, NUMBER, number)
            self._numbers[id(parameter)] = number
            if self.optimizer.step_in_backward and parameter.requires_grad:
                self._watch(number)

    def _let_go(self, parameter: Tensor) -> None:
        """Another optimizer has the parameter now."""
        number = self._numbers.pop(id(parameter))
        self.taken.add(number)
        if number in self._handles:
            self._handles.pop(number).remove()

    def has(self, parameter: Tensor) -> bool:
        number = self._numbers.get(id(parameter))
        return number is not None and self._parameters[number][1]() is parameter

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return len(self._parameters)

    def number_of(self, parameter: Tensor) -> int:
        """Its place in the optimizer, which has it."""
        return self._numbers[id(parameter)]

    def _parameter(self, number: int) -> nn.Parameter:
        parameter = self._parameters[number][1]()
        assert parameter is not None  # whoever asks has a gradient of it
        return parameter

    # --- what the ops call --------------------------------------------------------------------------------------------

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to bring state in as far as there is room; with step_in_backward the rest follows where `evict` makes it.
        Where gradients are accumulated, in the last backward pass only."""
        if self.optimizer.step_in_backward:
            self._away.extend(self._pages(numbers))
            fetch(self.optimizer.pool, self._away)
        else:
            self.planned = True
            if self._in_last_pass(numbers):
                self.optimizer.pool.prefetch(self._pages(numbers), displace=False)

    def _in_last_pass(self, numbers: Sequence[int]) -> bool:
        """Whether no backward pass follows before the step, if it has as many as the step before (in the first one each is
        taken for the last): what comes earlier lies beside the activations of those that follow."""
        if not self._asked or not self._asked.isdisjoint(numbers):  # none asks twice for the same
            self._asked = set()
            self._passes += 1
        self._asked.update(numbers)
        return self._passes >= self._passes_before

    def stepped(self) -> None:
        """The end of a step of all parameters."""
        self._passes_before = self._passes
        self._begin_to_count()

    def _begin_to_count(self) -> None:
        self._passes, self._asked = 0, set()

    @whole
    def accumulate(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> list[Tensor]:
        """The same values, in pages where that can be."""
        pairs = zip(gradients, numbers, strict=True)
        return [self.gradients.place(self._parameter(number), gradient) for gradient, number in pairs]

    def step(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Update those of these parameters that the backward pass is to reach: `inputs=` may name others."""
        pairs = zip(gradients, numbers, strict=True)
        wanted = [(gradient, number) for gradient, number in pairs if _is_reached(self._parameter(number))]
        if wanted:
            self._update([gradient for gradient, _ in wanted], [number for _, number in wanted])

    @whole
    def _update(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Raises ModelStateError where one of them was updated since the last `step()`, or is another optimizer's."""
        optimizer = self.optimizer
        check_one_process(type(optimizer).__name__)
        self.check_whole()
        again = next((number for number in numbers if number in self._stepped), None)
        if again is not None:
            raise ModelStateError(
                f"Parameter {again} got a second gradient before {type(optimizer).__name__}.step(): with "
                "step_in_backward=True there is one backward pass to a step, in which each gradient is whole. Call step() "
                "after each, or zero_grad() to go on after one that failed; use step_in_backward=False to accumulate, or "
                "for a model with graph breaks between uses of a parameter."
            )
        if not self._stepped:
            self._waiting = Counter(page for number in range(len(self._parameters)) for page in self._pages([number]))
        self._stepped |= dict.fromkeys(numbers)
        self._waiting.subtract(page for number in numbers for page in self._pages([number]))
        totals = [gradient.sum(dtype=torch.float32) for gradient in gradients]
        if defers(optimizer.pool):
            self._totals |= dict(zip(numbers, totals))
            finite = [True] * len(totals)
        else:
            finite, totals = [bool(torch.isfinite(total)) for total in totals], []
        self.skipped += [number for number, good in zip(numbers, finite) if not good]
        groups = [optimizer.param_groups[self._parameters[number][0]] for number in numbers]
        given = zip(groups, numbers, gradients, finite)
        chosen = [(group, self._parameter(n), g) for group, n, g, good in given if good]
        optimizer.update_some(chosen, tuple(n for n, good in zip(numbers, finite) if good), totals)

    def check_whole(self) -> None:
        """Raises ModelStateError where another optimizer has taken some of the parameters over."""
        if self.taken:
            raise ModelStateError(
                f"{len(self.taken)} parameters of this {type(self.optimizer).__name__} with step_in_backward=True were "
                f"taken over by a paged optimizer made later, number {min(self.taken)} among them: go on with that one, or "
                "make a new one of all that train."
            )

    def evict(self, numbers: Sequence[int]) -> None:
        """Send out the pages of these parameters in which nothing waits for its update."""
        self.optimizer.pool.evict([p for p in self._pages(numbers) if self._waiting[p] <= 0], keep_spare=True)
        fetch(self.optimizer.pool, self._away)

    # --- eager --------------------------------------------------------------------------------------------------------

    def _watch(self, number: int) -> None:
        """Update the parameter whenever its gradient has been accumulated."""
        me = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            pager = me()
            gradient = parameter.grad  # None where a compiled graph has used it up
            if gradient is not None and pager is not None and pager._optimizer() is not None:
                parameter.grad = None
                pager.step_eagerly(number, gradient)

        self._handles[number] = self._parameter(number).register_post_accumulate_grad_hook(hook)

    def catch_up(self) -> None:
        """Parameters that were frozen when they were claimed and train now: the gradients that they have."""
        for number, (_, reference) in enumerate(self._parameters):
            parameter = reference()
            if parameter is None or not parameter.requires_grad or number in self._handles or number in self.taken:
                continue
            self._watch(number)
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._update([gradient], [number])

    def step_eagerly(self, number: int, gradient: Tensor) -> None:
        """One parameter's step, with what came after it in the pass before prefetched."""
        self._update([gradient], [number])
        if self.optimizer.pool.budget is None:
            return
        self.evict([number])
        at = self._order.index(number) + 1 if number in self._order else len(self._order)
        self.prefetch([n for n in self._order[at : at + _AHEAD] if n not in self._stepped])

    def finish(self) -> dict[int, Tensor]:
        """The end of a backward pass -> the parameters whose gradient was not finite, by number."""
        self._look_at_totals()
        self._order, self._stepped = list(self._stepped), {}
        self._away.clear()
        skipped, self.skipped = self.skipped, []
        return {number: self._parameter(number) for number in skipped}

    @property
    def has_stepped(self) -> bool:
        """Whether the pass that has ended reached a parameter."""
        return bool(self._order)

    def abandon(self) -> None:
        """The end of a backward pass that failed: what it has updated may be updated by the next one."""
        self._begin_to_count()
        self._look_at_totals()
        self._stepped.clear()
        self._away.clear()

    def _look_at_totals(self) -> None:
        if not self._totals:
            return
        good = torch.isfinite(torch.stack([*self._totals.values()])).tolist()
        late = [number for number, fine in zip(self._totals, good) if not fine]
        for number in late:  # the kernel left it as it was
            state = self.optimizer.states.get(self._parameter(number))
            assert state is not None
            state.step -= 1
        self.skipped += late
        self._totals = {}

    def _pages(self, numbers: Iterable[int]) -> list[Page]:
        states = self.optimizer.states
        found = [states.get(self._parameters[number][1]()) for number in numbers]
        return list(dict.fromkeys(span.page for state in found if state is not None for span in state.spans))


def _is_reached(parameter: Tensor) -> bool:
    """Whether the backward pass that is running accumulates this parameter's gradient.

    Raises ModelStateError where it was to return it, which it has no more.
    """
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:  # that is how it says so
        raise ModelStateError(
            "torch.autograd.grad was asked for the gradient of a parameter that step_in_backward=True updates with it and "
            "does not return: make the optimizer with step_in_backward=False, or name other inputs."
        ) from error


def _disown(number: int, parameters: Sequence[tuple[int, weakref.ref[nn.Parameter]]], handles: dict[int, Any]) -> None:
    """The optimizer is gone: graphs that name it are traced anew, and gradients stay where they are accumulated."""
    for _, reference in parameters:
        parameter = reference()
        if getattr(parameter, PAGER, -1) == number:
            setattr(parameter, PAGER, -1)
    for handle in handles.values():
        handle.remove()
