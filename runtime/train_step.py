"""One optimizer step: accumulate over micro-batches by token count, unscale, clip, step or skip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError, MemoryBudgetError, NonFiniteError
from .data import Batch
from .distributed import Processes
from .memory import format_bytes
from .micro_batches import MicroBatches, is_out_of_memory
from .optimizer import trainable_parameters
from .paged_optimizer import PagedOptimizer
from .sharded import gathered
from .step_memory import StepMemory
from .training_state import restore_rng, rng_state

MAX_BAD_STEPS = 5


class StepResult(NamedTuple):
    """`loss` is the mean over all loss tokens of the step, `grad_norm` the global norm before clipping."""

    loss: float
    grad_norm: float
    loss_tokens: int
    skipped: bool


class TrainStep:
    """A step of `optimizer` over any number of micro-batches, as if they were one batch.

    Each micro-batch's mean loss is weighted by its share of the loss tokens, so the gradient is the exact mean over
    all tokens, however unevenly they are spread. `max_grad_norm` 0 means no clipping. With a `scaler` (fp16) the loss
    is scaled, and an overflow skips the step and halves the scale; ConfigError where a parameter itself trains in fp16.
    Any other step with non-finite gradients is skipped and counted; after five in a row NonFiniteError names a parameter.

    Batches may have any number of rows and any length, from step to step. Where memory runs out, what the step has done is
    undone, a paged optimizer's state leaves the device, and the step is done again; then in parts of half as many rows,
    which later steps keep to. `notice` is told once. MemoryBudgetError where a single row does not fit. With several
    processes, which would wait for each other's gradients, the error passes.

    With `memory` what does not fit its budget is done so from the start: the pages leave, then micro-batches get smaller.

    An optimizer with `step_in_backward` takes one batch a step, no clipping and no scaler: ConfigError otherwise.

    With several `processes`, each is called with its own micro-batches, `call` is what `processes.wrap` made of the
    model, and all of theirs count as one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float,
        scaler: torch.amp.GradScaler | None = None,
        call: nn.Module | None = None,
        processes: Processes | None = None,
        memory: StepMemory | None = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.in_backward = bool(getattr(optimizer, "step_in_backward", False))
        if self.in_backward and (max_grad_norm > 0 or scaler is not None):
            what = "clipping by the global norm (max_grad_norm)" if max_grad_norm > 0 else "a GradScaler (float16)"
            raise ConfigError(
                f"step_in_backward=True does not go with {what}: it needs all gradients before an update."
            )
        self.call = model if call is None else call
        self.processes = processes or Processes()
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.parameters = trainable_parameters(model)
        half = [name for name, parameter in self.parameters.items() if parameter.dtype == torch.float16]
        if scaler is not None and half:
            raise ConfigError(
                f"A GradScaler unscales no float16 gradients, but {half[0]} trains in float16: make it float32, or use "
                "bfloat16 without a scaler."
            )
        self.bad_steps = 0
        self.micro_batches = MicroBatches(memory)
        self._notice = notice
        self._told = False

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        processes, device = self.processes, batches[0].input_ids.device
        loss_tokens = int(processes.total(sum(batch.loss_tokens for batch in batches), device))
        if self.in_backward and len(batches) > 1:
            raise ConfigError("step_in_backward=True takes one batch a step: set grad_accum to 1.")
        loss = self._all_gradients(batches, loss_tokens)
        mean_loss = processes.total(loss, device) / processes.count
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.in_backward:
            result = self._end_step(StepResult(mean_loss, math.nan, loss_tokens, skipped=False))
        else:
            result = self._clipped_step(mean_loss, loss_tokens)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _clipped_step(self, mean_loss: float, loss_tokens: int) -> StepResult:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = gathered(torch.nn.utils.get_total_norm(gradients))
        result = StepResult(mean_loss, float(norm), loss_tokens, skipped=not bool(torch.isfinite(norm)))
        if result.skipped:
            self._count_bad_step(result)
            return result
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.bad_steps = 0
        return result

    def _end_step(self, result: StepResult) -> StepResult:
        """Of an optimizer that stepped in backward, which leaves a parameter as it was where its gradient is not finite."""
        try:
            self.optimizer.step()
        except NonFiniteError:
            assert isinstance(self.optimizer, PagedOptimizer)
            skipped = {id(parameter) for parameter in self.optimizer.skipped.values()}
            name = next(name for name, parameter in self.parameters.items() if id(parameter) in skipped)
            result = result._replace(skipped=True)
            self._count_bad_step(result, name)
            return result
        self.bad_steps = 0
        return result

    def _all_gradients(self, batches: Sequence[Batch], loss_tokens: int) -> float:
        """Accumulate over all micro-batches, smaller ones where they do not fit; -> this process's share of the loss."""
        alone = self.processes.count == 1
        self._make_room(batches)
        state, remedy = rng_state(), ""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            parts, at = self.micro_batches.split(batches) if alone else list(batches), 0
            loss = torch.zeros((), device=batches[0].input_ids.device)
            try:
                for at, batch in enumerate(parts):
                    # gradients are averaged over the processes, where the mean over all tokens is their sum
                    with self.processes.reducing(self.call, at + 1 == len(parts)):
                        loss = loss + self._backward(batch, self.processes.count * batch.loss_tokens / loss_tokens)
                ran_out = "memory ran out in a step, which was undone and done again"
                self._tell(f"{ran_out}: {remedy}" if remedy else "")
                return float(loss)
            except (RuntimeError, MemoryError) as error:
                # in backward some parameters may have been updated already
                if not is_out_of_memory(error) or self.in_backward or not alone:
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            if not remedy and isinstance(self.optimizer, PagedOptimizer) and self.optimizer.evict():
                remedy = "the optimizer's pages were sent to the host"
            else:
                self.micro_batches.shrink(parts[at])
                remedy = f"steps are split into micro-batches of at most {self.micro_batches.most_tokens} tokens"
            restore_rng(state)  # dropout draws the same numbers again

    def _make_room(self, batches: Sequence[Batch]) -> None:
        """What the memory budget asks for before a step. Raises MemoryBudgetError where that cannot be."""
        memory = self.micro_batches.memory
        if memory is None:
            return
        rooms = [(*batch.input_ids.shape, memory.room(*batch.input_ids.shape)) for batch in batches]
        rows, seq_len, room = min(rooms, key=lambda entry: entry[2].rows / entry[0])
        what = f"{rows} sequences of {seq_len} tokens do not fit the memory budget of {format_bytes(memory.budget)}"
        if self.in_backward and room.rows < rows:
            raise MemoryBudgetError(
                f"{what}, and step_in_backward=True takes one micro-batch a step: set batch to {room.rows}."
            )
        remedy = ""
        if self.micro_batches.without_pages(batches) and isinstance(self.optimizer, PagedOptimizer):
            self.optimizer.evict()
            remedy = "the optimizer's pages are on the host meanwhile"
        if room.rows < rows:
            remedy = f"they are split into micro-batches of at most {room.rows}" + (f", {remedy}" if remedy else "")
        self._tell(f"{what}: {remedy}" if remedy else "")

    def _tell(self, text: str) -> None:
        if text and not self._told:
            self._told = True
            self._notice(text)

    def _backward(self, batch: Batch, share: float) -> torch.Tensor:
        """Adds this micro-batch's gradients; returns its part of the loss, on the device and without a graph."""
        loss = self.call(input_ids=batch.input_ids, labels=batch.labels).loss * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _count_bad_step(self, result: StepResult, name: str = "") -> None:
        # A finite loss whose scaled gradients overflow fp16 is what the scale is there to find: it is halved, and the
        # next steps decide. At a scale of 1 there is nothing left to halve.
        overflow = self.scaler is not None and self.scaler.get_scale() > 1 and math.isfinite(result.loss)
        self.bad_steps += 0 if overflow else 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"The gradients were not finite {self.bad_steps} steps in a row (loss {result.loss}), for example that "
                f"of {name or self._first_bad()}: lower the learning rate, or train in bfloat16 instead of float16."
            )

    def _first_bad(self) -> str:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return name
        return "the global norm alone"
