"""transformers' Trainer with a paged optimizer: `optimizers=(optimizer, None)`, and a callback that shows its pages.

Trainer(model, args, train_dataset=..., optimizers=(optimizer, None), callbacks=[PagingCallback(optimizer)])

Trainer calls the reporters (TensorBoard, W&B) before its `callbacks`, so they see the numbers only where this one stands
before them: `trainer.callback_handler.callbacks.insert(0, PagingCallback(optimizer))`, and not in `callbacks`.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from .paged_optimizer import PagedOptimizer


class PagingCallback(TrainerCallback):
    """Adds to every log line, and to its copy in `log_history`, what moved since the one before; `history` keeps it too.

    `paging_resident_bytes` and `paging_paged_bytes` of state now, `paging_moved_bytes` in both directions,
    `paging_hit_rate` (where nothing was asked for left out of the log, and None in `history`) and `paging_stall_ms` since
    the last line. With `step_in_backward` the start raises ConfigError for arguments that need all gradients before an
    update.
    """

    def __init__(self, optimizer: PagedOptimizer) -> None:
        """Raises ConfigError for an optimizer without pages."""
        if not isinstance(optimizer, PagedOptimizer):
            raise ConfigError(
                f"PagingCallback shows the pages of PagedAdamW or PagedLion, got {type(optimizer).__name__}."
            )
        self.optimizer = optimizer
        self.history: list[dict[str, Any]] = []
        self._before = optimizer.statistics()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what `step_in_backward` cannot do."""
        if not self.optimizer.step_in_backward:
            return
        for name, good in (("max_grad_norm", (0, None)), ("gradient_accumulation_steps", (1,)), ("fp16", (False,))):
            if getattr(args, name) not in good:
                raise ConfigError(
                    f"step_in_backward=True does not go with {name}={getattr(args, name)!r}: set it to {good[0]!r}."
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the numbers to the line, and to what Trainer has kept of it already."""
        now, before = self.optimizer.statistics(), self._before
        asked = now.hits + now.misses - before.hits - before.misses
        moved = now.moved_in_bytes + now.moved_out_bytes - before.moved_in_bytes - before.moved_out_bytes
        line: dict[str, Any] = {
            "paging_resident_bytes": now.resident_pages * now.page_bytes,
            "paging_paged_bytes": now.paged_pages * now.page_bytes,
            "paging_moved_bytes": moved,
            "paging_hit_rate": (now.hits - before.hits) / asked if asked else None,
            "paging_stall_ms": round(now.stall_ms - before.stall_ms, 3),
        }
        self._before = now
        self.history.append(line)
        known = {name: number for name, number in line.items() if number is not None}
        if logs is not None:
            logs.update(known)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(known)
