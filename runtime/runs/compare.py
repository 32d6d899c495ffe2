"""Two runs side by side: settings that differ, results, and whether the difference on held-out text is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .store import RunStore, StoredRun

RESAMPLES = 10_000
DRAWS = 20_000_000  # documents drawn at a time: bounds memory
STAGE = "final"


@dataclass(frozen=True)
class Bootstrap:
    """`difference`: b - a, in nats per token; `low` and `high` enclose it with 95%; `p_value` is two-sided."""

    difference: float
    low: float
    high: float
    p_value: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """Run a against run b. `settings` and `results` map a name to both values; `significance` is None, and `why_not` says
    why, where the evaluations cannot be paired."""

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    results: dict[str, tuple[Any, Any]]
    significance: Bootstrap | None
    why_not: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(store: RunStore, a: StoredRun, b: StoredRun, stage: str = STAGE) -> Comparison:
    """Both runs by their last evaluation of `stage`."""
    settings = differences(flat(a.config), flat(b.config), leave_out=("out",))
    settings |= differences(a.versions, b.versions)
    results = {
        name: pair for name, pair in _pairs(a.results or {}, b.results or {}).items() if name not in ("out", "adapter")
    }
    why_not = _why_not_paired(a, b)
    found = None
    if why_not is None:
        evaluations = [_evaluation(store, run, stage) for run in (a, b)]
        found, why_not = _significance(evaluations, (a, b), stage)
    return Comparison(a.folder, b.folder, settings, results, found, why_not)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one, names joined by dots; lists as text."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return found


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], leave_out: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Name -> both values, of what is not the same (None: one has no such name)."""
    return {name: pair for name, pair in _pairs(a, b).items() if pair[0] != pair[1] and name not in leave_out}


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in (*a, *(n for n in b if n not in a)) if name != "losses"}


def _why_not_paired(a: StoredRun, b: StoredRun) -> str | None:
    for run in (a, b):
        if run.eval_data is None:
            return f"{run.folder} was not evaluated: finetune --eval-data"
    assert a.eval_data is not None and b.eval_data is not None
    if a.eval_data["sha256"] != b.eval_data["sha256"]:
        return "they were evaluated on different tokens (other text, tokenizer or sequence length)"
    return None


def _evaluation(store: RunStore, run: StoredRun, stage: str) -> dict[str, Any] | None:
    return next((line for line in reversed(store.lines(run.id, "eval")) if line["stage"] == stage), None)


def _significance(
    evaluations: Sequence[dict[str, Any] | None], runs: Sequence[StoredRun], stage: str
) -> tuple[Bootstrap | None, str | None]:
    sums: list[dict[int, tuple[float, int]]] = []
    for evaluation, run in zip(evaluations, runs):
        if evaluation is None:
            return None, f"{run.folder} has no evaluation {stage!r}"
        sums.append({document: (loss, tokens) for document, loss, tokens in evaluation["documents"]})
    # With another number of evaluated batches the last document may be cut short in one of them.
    shared = [d for d in sums[0] if d in sums[1] and sums[0][d][1] == sums[1][d][1]]
    if len(shared) < 2:
        return None, f"it needs two documents or more, and the evaluation data has {len(shared)}"
    loss_a, loss_b = (np.array([side[d][0] for d in shared]) for side in sums)
    tokens = np.array([sums[0][d][1] for d in shared])
    return paired_bootstrap(loss_a, loss_b, tokens), None


def paired_bootstrap(
    loss_a: ArrayLike, loss_b: ArrayLike, tokens: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Bootstrap:
    """Summed losses of two models and token counts, one a document -> the difference of mean losses and its certainty.

    Documents are drawn with replacement, both models' losses of a document together (Efron & Tibshirani 1993, ch. 6 and
    13: percentile interval). The p-value is twice the smaller share of resamples on either side of zero, at least
    2 / (resamples + 1).
    """
    gap, weight = np.asarray(loss_b, np.float64) - np.asarray(loss_a, np.float64), np.asarray(tokens)
    count = len(weight)
    generator = np.random.default_rng(seed)
    found = np.empty(resamples)
    rows = max(1, DRAWS // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        found[start : start + rows] = gap[drawn].sum(1) / weight[drawn].sum(1)
    low, high = np.quantile(found, (0.025, 0.975))
    below, above = int((found <= 0).sum()), int((found >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))
    total = int(weight.sum())
    return Bootstrap(float(gap.sum()) / total, float(low), float(high), p_value, count, total)


def in_words(found: Bootstrap, a: str, b: str) -> str:
    """One sentence for people."""
    better, ratio = (b, found.difference) if found.difference < 0 else (a, -found.difference)
    certain = "more than chance" if found.p_value < 0.05 else "no more than chance may give"
    text = (
        f"{better} is better by {1 - math.exp(ratio):.2%} of perplexity: {found.difference:+.5f} nats a token "
        f"(95%: {found.low:+.5f} to {found.high:+.5f}), p = {found.p_value:.4f} over {found.documents} documents: {certain}"
    )
    return text + ("; so few documents say little" if found.documents < 20 else "")
