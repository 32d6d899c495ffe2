"""The learning rate of each step."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_compile.runtime.schedule import SCHEDULES, learning_rate, warmup_steps


def curve(schedule: str, total: int, warmup: int) -> list[float]:
    return [learning_rate(i, lr=0.5, schedule=schedule, total_steps=total, warmup=warmup) for i in range(total)]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.03, 3), (0.031, 4), (1, 1), (7, 7), (1000, 100)])
def test_warmup_is_a_count_or_a_fraction(warmup: float, steps: int) -> None:
    assert warmup_steps(warmup, 100) == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_rises_to_the_full_rate_and_is_never_zero(schedule: str) -> None:
    rates = curve(schedule, total=11, warmup=4)
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5]
    assert min(rates) > 0 and max(rates) == 0.5
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_constant_stays() -> None:
    assert curve("constant", 7, 0) == [0.5] * 7


def test_cosine_and_linear_equal_torch_schedulers() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for schedule in ("cosine", "linear"):
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        peer: torch.optim.lr_scheduler.LRScheduler
        if schedule == "cosine":
            peer = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
        else:
            peer = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=9)
        wanted = []
        for _ in range(9):
            wanted.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            peer.step()
        # torch multiplies from step to step, so its rounding errors add up: 1e-12 is far above them.
        assert curve(schedule, 9, 0) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_warmup_over_the_whole_run_never_divides_by_zero() -> None:
    assert math.isclose(curve("cosine", 4, 4)[-1], 0.5)
