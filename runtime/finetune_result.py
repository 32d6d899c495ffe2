"""`FinetuneResult`: what a training run gave, read off its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .metrics import read_metrics
from .run_folder import RunFolder


@dataclass(frozen=True)
class FinetuneResult:
    """What a run gave. Perplexities are on the evaluation data, None without it; `losses` has one entry a step, None
    for a loss that was not finite; `tokens_per_s` is the median over the steps."""

    out: Path
    adapter: Path
    steps: int
    losses: tuple[float | None, ...]
    skipped_steps: int
    perplexity_dense: float | None
    perplexity_quantized: float | None
    perplexity: float | None
    tokens_per_s: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        values = asdict(self) | {"losses": list(self.losses)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def of_run(cls, folder: RunFolder, step: int, perplexity: Mapping[str, float], seconds: float) -> FinetuneResult:
        """`perplexity` by stage: "dense", "quantized", "final"."""
        lines = [line for line in read_metrics(folder.metrics) if line["event"] == "step"]
        speeds = sorted(line["tokens_per_s"] for line in lines)
        return cls(
            out=folder.path,
            adapter=folder.adapter,
            steps=step,
            losses=tuple(line["loss"] for line in lines),
            skipped_steps=sum(line["skipped"] for line in lines),
            perplexity_dense=perplexity.get("dense"),
            perplexity_quantized=perplexity.get("quantized"),
            perplexity=perplexity.get("final"),
            tokens_per_s=speeds[len(speeds) // 2] if speeds else 0.0,
            seconds=round(seconds, 1),
        )
