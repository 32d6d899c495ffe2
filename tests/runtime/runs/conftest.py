"""Runs that were never trained, for what only reads or writes their records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def make_run(run_id: str = "a1b2c3d4e5f6", **changes: Any) -> dict[str, Any]:
    """What `run.json` of a run with evaluation data holds; keywords replace or add."""
    qlora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {}}
    content: dict[str, Any] = {
        "id": run_id,
        "status": "running",
        "step": 0,
        "config": {"model": "models/SmolLM2", "lr": 1e-3, "out": f"runs/{run_id}", "qlora": qlora},
        "versions": {"torch": "2.13.0"},
        "data": {"sha256": "d1", "blocks": 40, "documents": 7},
        "eval_data": {"sha256": "e1", "blocks": 9, "documents": 3},
    }
    return content | changes


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    return {"event": "step", "step": step, "loss": 3.0 / step, "tokens_per_s": 50.0, "memory_bytes": 10**9} | changes


def eval_line(documents: list[tuple[int, float, int]], stage: str = "final", step: int = 8) -> dict[str, Any]:
    tokens = sum(n for *_, n in documents)
    loss = sum(x for _, x, _ in documents) / max(tokens, 1)
    line = {"event": "eval", "step": step, "stage": stage, "loss": loss, "perplexity": 2.7**loss, "tokens": tokens}
    return line | {"seconds": 0.5, "documents": [list(each) for each in documents]}


@pytest.fixture
def records() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """(make_run, step_line, eval_line)"""
    return make_run, step_line, eval_line
