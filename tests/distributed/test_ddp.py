"""DistributedDataParallel around a prepared model: as one process with the summed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

FAST = ("too_early", "eager", "split_by_dynamo", "accumulation", "paged")
ALL = (*FAST, "compiled", "bf16", "compiled_outside", "checkpointing", "wrapped_in_a_module")


@pytest.fixture(params=[pytest.param((2, FAST), id="2"), pytest.param((4, ALL), id="4", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, checks: Callable[..., Any]) -> dict[str, Any]:
    world, names = request.param
    return checks("ddp", world, names)


def _same(found: dict[str, Any], tolerance: float) -> None:
    # fp32: the mean of a batch's parts against that of the whole, through two blocks: some 1e-6 of a loss of 4
    assert found["losses"] == pytest.approx(found["expected"], abs=tolerance)
    assert found["expected"][0] != pytest.approx(found["expected"][-1], abs=100 * tolerance)  # it does train
    assert found["difference"] < 10 * tolerance
    assert found["weights as they were"]


def test_eager(found: dict[str, Any]) -> None:
    _same(found["eager"], 1e-5)


def test_graph_that_dynamo_splits_at_the_buckets(found: dict[str, Any]) -> None:
    split = found["split_by_dynamo"]
    _same(split, 1e-5)
    assert split["graphs"] > 1
    assert split["fused"] == split["linears"] == 12


def test_accumulation_without_synchronization(found: dict[str, Any]) -> None:
    assert found["accumulation"]["difference"] < 1e-5
    assert not found["accumulation"]["ranks agree before the last"]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        # fp32's rounding of gradients, divided by eps = 0.01: some 1e-7 of a step of 0.02
        ("gradients in pages", 1e-5),
        # a code of 8 bits that falls to its neighbour: 1/128 of a moment, of a step of 0.02
        ("8 bits", 2e-4),
        # the sign of an element that is all rounding
        ("Lion", 2 * 0.02 * 3),
    ],
)
def test_paged_optimizers_behind_inductor(name: str, tolerance: float, found: dict[str, Any]) -> None:
    paged = found["paged"][name]
    assert paged["losses"] == pytest.approx(paged["expected"], abs=1e-4)
    assert paged["expected"][0] != pytest.approx(paged["expected"][-1], abs=1e-2)
    assert paged["difference"] <= tolerance
    assert paged["ranks agree"]
    assert paged["moved"] > 0 and paged["misses"] == 0


def test_wrapping_comes_after_preparing(found: dict[str, Any]) -> None:
    for said in (found["too_early"]["compiled"], found["too_early"]["prepared"]):
        assert "in DistributedDataParallel already" in said and "qlora_compile.prepare(model" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled_outside", "checkpointing", "wrapped_in_a_module"])
def test_other_ways(name: str, checks: Callable[..., Any]) -> None:
    _same(checks("ddp", 4, ALL)[name], 1e-5)


@pytest.mark.slow
def test_bf16(checks: Callable[..., Any]) -> None:
    # products of 8 bits' precision: 2^-8 of a logit of about 1, averaged over some hundred tokens
    found = checks("ddp", 4, ALL)["bf16"]
    assert found["losses"] == pytest.approx(found["expected"], abs=4e-3)
    assert found["weights as they were"]
