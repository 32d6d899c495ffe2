"""One optimizer step: accumulate over micro-batches by token count, unscale, clip, step or skip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..errors import NonFiniteError
from .data import Batch
from .distributed import Processes
from .optimizer import trainable_parameters
from .sharded import gathered

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
    is scaled, and an overflow skips the step and halves the scale. Any other step with non-finite gradients is skipped
    and counted; after five in a row NonFiniteError names a parameter.

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
    ) -> None:
        self.call = model if call is None else call
        self.processes = processes or Processes()
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.scaler = scaler
        self.parameters = trainable_parameters(model)
        self.bad_steps = 0

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        processes, device = self.processes, batches[0].input_ids.device
        loss_tokens = int(processes.total(sum(batch.loss_tokens for batch in batches), device))
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            # gradients are averaged over the processes, where the mean over all tokens is their sum
            with processes.reducing(self.call, number == len(batches)):
                loss = loss + self._backward(batch, processes.count * batch.loss_tokens / loss_tokens)
        mean_loss = processes.total(float(loss), device) / processes.count
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = gathered(torch.nn.utils.get_total_norm(gradients))
        result = StepResult(mean_loss, float(norm), loss_tokens, skipped=not bool(torch.isfinite(norm)))
        if result.skipped:
            self._count_bad_step(result)
        else:
            self.bad_steps = 0
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
            self._optimizer_step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _backward(self, batch: Batch, share: float) -> torch.Tensor:
        """Adds this micro-batch's gradients; returns its part of the loss, on the device and without a graph."""
        loss = self.call(input_ids=batch.input_ids, labels=batch.labels).loss * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _optimizer_step(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)

    def _count_bad_step(self, result: StepResult) -> None:
        # A finite loss whose scaled gradients overflow fp16 is what the scale is there to find: it is halved, and the
        # next steps decide. At a scale of 1 there is nothing left to halve.
        overflow = self.scaler is not None and self.scaler.get_scale() > 1 and math.isfinite(result.loss)
        self.bad_steps += 0 if overflow else 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise NonFiniteError(
                f"The gradients were not finite {self.bad_steps} steps in a row (loss {result.loss}), for example that "
                f"of {self._first_bad()}: lower the learning rate, or train in bfloat16 instead of float16."
            )

    def _first_bad(self) -> str:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return name
        return "the global norm alone"
