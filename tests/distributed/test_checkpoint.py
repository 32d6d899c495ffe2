"""torch.distributed.checkpoint: saved on 2 ranks, gone on from on 4 and then on 1, exactly; PEFT's files by rank 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(launch: Callable[..., Any], tmp_path: Path) -> Run:
    """`run(2, "paged-0", ...)` -> what these checks of the worker found; they share a folder."""

    def run(world: int, *names: str) -> dict[str, Any]:
        out = tmp_path / f"{world}.json"
        process = launch(world, Path(__file__).with_name("checkpoint_worker.py"), out, *names)
        assert process.returncode == 0, process.stderr[-6000:]
        return json.loads(out.read_text())

    return run


@pytest.mark.slow
def test_split_on_two_ranks_loaded_by_one(run: Run) -> None:
    """Adapters and moments, the 4-bit weights, and the adapter's files."""
    two = run(2, "paged-0", "save_everything", "save_adapter")
    one = run(1, "paged-2", "load_everything")
    assert one["paged-2"]["loaded"] == two["paged-0"]["saved"]
    assert len(two["paged-0"]["saved"]) == 24 * 4  # 12 layers' A and B: value, step and two moments
    assert len(one["load_everything"]) == 12 and all(one["load_everything"].values())
    assert all(two["save_adapter"].values()) and "adapter_model.safetensors" in two["save_adapter"]


@pytest.mark.slow
def test_two_then_four_then_one(run: Run) -> None:
    kinds = ("adamw", "paged", "paged8")
    two = run(2, *(f"{kind}-0" for kind in kinds), "save_everything")
    four = run(4, *(f"{kind}-2" for kind in kinds), "load_everything")
    one = run(1, *(f"{kind}-4" for kind in kinds), "straight")
    assert all(four["load_everything"].values())
    for kind in ("adamw", "paged"):
        assert four[f"{kind}-2"]["loaded"] == two[f"{kind}-0"]["saved"]
        assert one[f"{kind}-4"]["loaded"] == four[f"{kind}-2"]["saved"]
    for kind in kinds:
        losses = two[f"{kind}-0"]["losses"] + four[f"{kind}-2"]["losses"] + one[f"{kind}-4"]["losses"]
        # fp32: sums of a batch's parts in other orders; 8-bit moments: none of these tensors has the 4096 elements that
        # it takes to be kept in 8 bits
        assert losses == pytest.approx(one["straight"], abs=2e-5)
