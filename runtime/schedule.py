"""Learning rate schedules as pure functions of the step: nothing to store, nothing to get wrong on resume."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def warmup_steps(warmup: float, total_steps: int) -> int:
    """A number of steps, or a fraction of all steps below 1 -> steps, at most all of them."""
    steps = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    return min(steps, total_steps)


def learning_rate(step: int, *, lr: float, schedule: str, total_steps: int, warmup: int) -> float:
    """The rate of the 0-based `step`: linear rise over `warmup` steps (never 0), then `schedule` down to 0 at the end.

    Cosine is half a period, as in SGDR (arXiv 1608.03983) without restarts.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if schedule == "linear":
        return lr * (1 - progress)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))
