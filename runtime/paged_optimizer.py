"""`PagedAdamW` and `PagedLion`: torch optimizers whose state lives in a page pool, 32-bit or 8-bit block-wise.

State is created when a parameter gets its first gradient, moves between the device and the host so that `device_budget`
holds, and is freed with its parameter. Results do not depend on the budget.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelStateError, NoAdapterError, NonFiniteError, QLoRACompileError
from ..interruption import whole
from .memory import PagePool, PoolStatistics
from .optimizer import NO_ADAPTERS
from .paged_backward import BackwardPager
from .paged_optimizer_checks import (
    NO_SCALER,
    check_gradient,
    check_group,
    check_numbers,
    check_one_process,
    check_options,
    check_place,
    check_unchanged,
    trainable,
    warn_of_no_gradient,
)
from .paged_optimizer_plan import Numbers, Task
from .paged_optimizer_state import StateView, from_dict
from .paged_optimizer_sweep import sweep
from .paged_optimizer_table import StateTable
from .sharded import local_part

Closure = Callable[[], Any]


class PagedOptimizer(torch.optim.Optimizer):
    """What both optimizers share.

    `state_bits` 32 or 8; `device_budget` bytes or "24GiB" for the state on the parameters' device (None: all of it
    stays there); beyond it pages go to RAM, at most `host_budget` of it if that is given, or to a file in `page_folder`
    (with both: to so much RAM first).
    `step_in_backward`: each parameter is updated as soon as its gradient is ready, in the backward pass, and `.grad` stays
    None; `step()` after each `backward()` ends the step. Not with clipping by the global norm, accumulation, `GradScaler`
    or several processes, which need all gradients first.
    `optimizer.pool` is the pool: its `budget` may be assigned while training, `statistics()` counts.

    Raises NoAdapterError for a list without a trainable parameter, MemoryBudgetError for a budget that cannot work,
    ModelStateError for parameters on several devices, ConfigError for other bad values.
    """

    lion: bool

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        state_bits: int,
        device_budget: int | str | None,
        host_budget: int | str | None,
        page_folder: str | Path | None,
        step_in_backward: bool,
    ) -> None:
        if state_bits not in (8, 32):
            raise ConfigError(f"state_bits must be 32 or 8, got {state_bits!r}.")
        check_numbers(defaults)
        given = list(params)
        first = next(trainable(given), None)
        if first is None:
            raise NoAdapterError(NO_ADAPTERS)
        self.state_bits = state_bits
        self.pool = PagePool(first.device, device_budget, folder=page_folder, host_budget=host_budget)
        self.states = StateTable(self.pool, lion=self.lion, state_bits=state_bits)
        self.skipped: dict[int, Tensor] = {}  # in the last step, by number: gradients not finite
        self.step_in_backward = step_in_backward
        self._warned = False  # of a step without gradients
        if step_in_backward:
            check_one_process(type(self).__name__)
        self.pager = BackwardPager(self)
        super().__init__(given, defaults)
        self.pager.claim()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; what trains must be on the pool's device and of a floating-point type that is known here.

        Raises ConfigError, ModelStateError, with nothing changed.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], type(self).__name__)
            for parameter in self.param_groups[-1]["params"]:
                if parameter.requires_grad:
                    check_place(parameter, self.pool.device)
        except QLoRACompileError:
            self.param_groups.pop()
            raise
        self.pager.claim()

    @property
    def state(self) -> StateView:
        """Parameter -> its state, copied out of the pages; an empty dictionary may be assigned, and resets all."""
        return StateView(self)

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if value:
            raise ModelStateError("The state lies in pages: change it with load_state_dict.")
        self.state.clear()

    def __getstate__(self) -> Any:
        raise ModelStateError(
            f"A {type(self).__name__} cannot be copied or pickled, its state lies in pages: keep state_dict(), and load "
            "that into a new optimizer."
        )

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update every parameter that has a gradient. Raises MemoryBudgetError before any of them is changed; Ctrl-C
        (SIGINT) waits until all of them are.

        With `step_in_backward` the updates are done already, and this ends the step: NonFiniteError where a gradient was
        not finite, whose parameter was left as it was.
        """
        if self.step_in_backward:
            return self._end_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        self.pager.stepped()
        if self.pager.planned and self.pool.budget is not None:
            self.pool.vacate()  # nothing of it is needed before the backward pass brings it back
        return loss

    def _end_step(self, closure: Closure | None) -> None:
        if closure is not None:
            raise ModelStateError("step_in_backward=True takes no closure: call backward(), then step().")
        if hasattr(self, "found_inf"):
            raise ModelStateError(NO_SCALER)
        self.pager.check_whole()
        self.pager.catch_up()
        self.states.generation += 1
        self.skipped = self.pager.finish()
        self._look_for_updates(self.pager.has_stepped)
        if self.skipped:
            raise NonFiniteError(
                f"The gradients of {len(self.skipped)} parameters were not finite, number {min(self.skipped)} among them: "
                "these were not updated, the others were. Lower the learning rate, or catch this error to go on."
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch.amp.GradScaler asks before anything else."""
        if self.step_in_backward:
            raise ModelStateError(NO_SCALER)
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; pages of gradients are given back, and a backward pass that failed is over."""
        super().zero_grad(set_to_none)
        with whole:
            self.pager.gradients.release()
            self.pager.abandon()

    def update(self) -> None:
        """One step of all parameters that have a `.grad`."""
        room = self.pool.unheld_bytes()
        if room is not None and room < 4 * self.pool.page_bytes and self.pager.gradients.alive_bytes:
            self.pager.gradients.move_out()  # the budget was made smaller meanwhile
        groups = self.param_groups
        pairs = [(g, p, p.grad) for g in groups for p in g["params"] if p.grad is not None]
        self.update_some(pairs)
        self._look_for_updates(bool(pairs))

    def _look_for_updates(self, found: bool) -> None:
        if not found and not self._warned:
            self._warned = True
            warn_of_no_gradient(type(self).__name__)

    @torch.no_grad()
    def update_some(
        self,
        pairs: Sequence[tuple[dict[str, Any], nn.Parameter, Tensor]],
        numbers: tuple[int, ...] = (),
        totals: Sequence[Tensor] = (),
    ) -> None:
        """One step of these (group, parameter, gradient). `numbers`, theirs, names the plan to use again; `totals` are the
        gradients' sums, for a kernel that looks at them itself. Raises MemoryBudgetError with nothing changed."""
        with self.pool.steady, whole, self.states.undone():
            self._update_some(pairs, numbers, totals)

    def _update_some(
        self,
        pairs: Sequence[tuple[dict[str, Any], nn.Parameter, Tensor]],
        numbers: tuple[int, ...],
        totals: Sequence[Tensor],
    ) -> None:
        tasks: list[Task] = []
        copies: list[tuple[Tensor, Tensor]] = []
        written: list[Tensor] = []
        known: dict[tuple[int, int], Numbers] = {}
        device = self.pool.device
        for (group, parameter, gradient), total in zip(pairs, totals or itertools.repeat(None)):
            if parameter.device != device:
                check_place(parameter, device)
            state = self.states.get(parameter) or self.states.add(parameter, id(group))
            mine = values = local_part(parameter)
            check_unchanged(mine, state.dtype, state.numel)
            key = (id(group), state.step + 1)
            if key not in known:
                check_options(group, type(self).__name__)
                known[key] = Numbers.of(group, state.step + 1, lion=self.lion)
            written.append(mine)
            if not mine.is_contiguous():
                values = mine.detach().contiguous()
                copies.append((mine, values))
            tasks.append(Task(values, self._plain(local_part(gradient), mine), state, known[key], total))
        if not tasks:
            return
        # with step_in_backward one backward pass is one generation
        sweep(self.pool, tasks, self.states.plan_for(tasks, numbers, begins=not self.step_in_backward))
        for task in tasks:
            task.state.step += 1
        for mine, values in copies:
            mine.detach().copy_(values)
        torch.autograd.graph.increment_version(written)

    def _plain(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        if gradient.layout is not torch.strided:
            raise ModelStateError(f"{type(self).__name__} takes no sparse gradients: make the embedding's dense.")
        check_gradient(gradient, parameter)
        return gradient if gradient.is_contiguous() else gradient.contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dictionary of ours, of torch.optim.AdamW, or of bitsandbytes' optimizers (8-bit or 32-bit).

        Raises CheckpointError where it does not fit and MemoryBudgetError where there is no room, with nothing changed.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        loaded = from_dict(self, state_dict)
        with whole:
            self.states.fill(loaded)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({**copy.deepcopy(saved), "params": group["params"], "betas": tuple(saved["betas"])})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def statistics(self) -> PoolStatistics:
        """The pool's counts."""
        return self.pool.statistics()

    def evict(self) -> int:
        """Send all state to the host, for a step that needs the device's memory, and wait until it has left; it comes back
        by itself. -> bytes."""
        size = self.pool.evict()
        self.pool.wait()
        return size


class PagedAdamW(PagedOptimizer):
    """AdamW (arXiv 1711.05101); options and their defaults are torch's. `state_bits=8` quantizes both moments by blocks.

    32-bit on x86 CPUs with AVX2: the moments are those of torch.optim.AdamW(foreach=False, fused=False) bit for bit; the
    parameters drift from its as those of torch's fused variant do (2e-7 in 60 steps), because torch's square root there
    is not correctly rounded and ours is.
    """

    lion = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        page_folder: str | Path | None = None,
        step_in_backward: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params,
            defaults,
            state_bits=state_bits,
            device_budget=device_budget,
            host_budget=host_budget,
            page_folder=page_folder,
            step_in_backward=step_in_backward,
        )


class PagedLion(PagedOptimizer):
    """Lion (arXiv 2302.06675): the sign of an average, one moment. The options are those of bitsandbytes' Lion."""

    lion = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        device_budget: int | str | None = None,
        host_budget: int | str | None = None,
        page_folder: str | Path | None = None,
        step_in_backward: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay},  # eps: bitsandbytes' Lion reads it
            state_bits=state_bits,
            device_budget=device_budget,
            host_budget=host_budget,
            page_folder=page_folder,
            step_in_backward=step_in_backward,
        )
