"""FSDP2 of a prepared model: bytes are split and gathered exactly, and it trains as one process with the summed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

FAST = ("exact_bytes", "eager", "compiled_whole", "accumulation", "memory_and_traffic", "refusals")
ALL = (*FAST, "compiled_blocks", "checkpointing", "hybrid", "bf16")
UNUSUAL = ("inductor", "checkpointing_compiled", "experts")
WORLDS = [pytest.param((2, FAST), id="2"), pytest.param((4, ALL), id="4", marks=pytest.mark.slow)]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[int, tuple[str, ...]]:
    return request.param


@pytest.fixture
def found(world: tuple[int, tuple[str, ...]], checks: Callable[..., Any]) -> dict[str, Any]:
    return checks("fsdp", *world)


def _same(found: dict[str, Any], tolerance: float = 1e-5) -> None:
    # fp32: the mean of a batch's parts against that of the whole, through two blocks: some 1e-6 of a loss of 4
    assert found["losses"] == pytest.approx(found["expected"], abs=tolerance)
    assert found["expected"][0] != pytest.approx(found["expected"][-1], abs=100 * tolerance)  # it does train
    assert found["difference"] < 10 * tolerance
    assert found["weights as they were"]


def test_bytes_come_back_exactly(found: dict[str, Any]) -> None:
    exact = found["exact_bytes"]
    assert len(exact) == 7
    assert all(failed == [] for failed in exact.values()), exact


def test_eager(found: dict[str, Any]) -> None:
    _same(found["eager"])


def test_compiled_as_a_whole(found: dict[str, Any]) -> None:
    _same(found["compiled_whole"])
    assert found["compiled_whole"]["fused"] == found["compiled_whole"]["linears"] == 12


def test_accumulation_without_reduction(found: dict[str, Any]) -> None:
    assert found["accumulation"]["difference"] < 1e-5
    assert found["accumulation"]["nothing reduced before the last"]


def test_each_rank_keeps_its_part_and_sends_what_the_formula_says(found: dict[str, Any], world: Any) -> None:
    numbers, ranks = found["memory_and_traffic"], world[0]
    formula = numbers["formula"]
    assert numbers["gathered"] == formula["gathered"] and numbers["reduced"] == formula["reduced"]
    assert max(numbers["kept"]) == formula["kept"]
    # what is padded: 61 rows of embedding and head on 4 ranks; and the second-level scales, which every rank has
    assert formula["kept"] * ranks < numbers["whole"] * 1.04


def test_refused_with_the_way_out(found: dict[str, Any]) -> None:
    said = found["refusals"]
    assert "do not end on a block of 64" in said["odd"] and "ignored_params" in said["odd"]
    assert "not stored row by row" in said["transposed"] and "ignored_params" in said["transposed"]
    assert said["odd, left whole"] == said["transposed, left whole"] == "QuantizedTensor"


@pytest.mark.slow
def test_compiled_by_blocks(checks: Callable[..., Any]) -> None:
    found = checks("fsdp", 4, ALL)["compiled_blocks"]
    _same(found)
    assert found["fused"] >= 6  # one block's graph serves both, or each has its own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpointing", "hybrid"])
def test_other_ways(name: str, checks: Callable[..., Any]) -> None:
    _same(checks("fsdp", 4, ALL)[name])


@pytest.mark.slow
def test_compiled_by_inductor(checks: Callable[..., Any]) -> None:
    found = checks("fsdp", 2, UNUSUAL)
    _same(found["inductor"])
    assert found["inductor"]["fused"] >= 6
    _same(found["checkpointing_compiled"])


@pytest.mark.slow
def test_experts_are_split(checks: Callable[..., Any]) -> None:
    found = checks("fsdp", 2, UNUSUAL)["experts"]
    _same(found)
    assert found["left whole"] == {}


@pytest.mark.slow
def test_bf16(checks: Callable[..., Any]) -> None:
    # products of 8 bits' precision: 2^-8 of a logit of about 1, averaged over some hundred tokens
    found = checks("fsdp", 4, ALL)["bf16"]
    assert found["losses"] == pytest.approx(found["expected"], abs=4e-3)
    assert found["weights as they were"]
