"""A run's perplexities by stage, all of them on the same held-out text, also where a resumed run is given another one."""

from __future__ import annotations

from typing import Any

from torch import nn

from .checkpoint import Checkpoint
from .data import PackedData
from .evaluate import evaluate
from .finetune_config import FinetuneConfig
from .reporters import EvalRecord, Reporter


class Evaluations:
    """`perplexity` by stage, as the checkpoint knows it or newly measured on `data` (None: never).

    `changed` says that the checkpoint's were measured on something else, and are left out.
    """

    def __init__(
        self, data: PackedData | None, config: FinetuneConfig, checkpoint: Checkpoint | None, reporter: Reporter
    ) -> None:
        self.data = data
        self.batch, self.limit = config.batch, config.eval_batches
        stored = checkpoint.state if checkpoint else {}
        self.perplexity: dict[str, float] = dict(stored.get("perplexity", {}))
        self.changed = bool(self.perplexity) and stored.get("evaluation") != self.measured_on
        if self.changed:
            self.perplexity.clear()
            remedy = "" if data is None else "; those before training are measured again"
            reporter.notice(
                f"the checkpoint's eval_data or eval_batches were others: its perplexities are dropped{remedy}"
            )

    @property
    def measured_on(self) -> dict[str, Any] | None:
        """What decides the numbers, for the checkpoint."""
        if self.data is None:
            return None
        return {"sha256": self.data.fingerprint, "batches": len(self.data.in_order(self.batch, self.limit))}

    def measure(self, model: nn.Module, stage: str, step: int) -> EvalRecord | None:
        """Evaluate; None where there is nothing to evaluate on. Raises NonFiniteError."""
        if self.data is None:
            return None
        found = evaluate(model, self.data, self.batch, self.limit)
        self.perplexity[stage] = found.perplexity
        return EvalRecord(step, stage, *found)
