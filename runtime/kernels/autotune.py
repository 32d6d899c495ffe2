"""Time every candidate for one problem on random tensors of its sizes, and remember the times on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...expert_products import ExpertGroup
from ...lora_group import LoRAGroup
from ...nf4 import SCALE_BLOCK_SIZE
from . import dispatch, tuning
from .dispatch import Candidate, Problem

EXPERTS = 4
HOPELESS = 4.0  # times the fastest of the nearest line of the shipped table: not measured again, it can take a minute


def measure(problem: Problem) -> dict[str, float]:
    """Microseconds by candidate, measured unless this machine's file has them all. Only one: nothing to measure."""
    mine, able = dispatch.entry_of(problem, {}), _able(problem, _hopeless(problem))
    for entry in tuning.measured(problem.device):
        if entry[:6] == mine[:6] and entry.microseconds.keys() >= {candidate.name for candidate in able}:
            return entry.microseconds  # else it is of a version with other kernels
    times = _times(problem, able)
    if times:
        tuning.remember([dispatch.entry_of(problem, times)], problem.device)
        dispatch.forget_choices()
    return times


def _hopeless(problem: Problem) -> set[str]:
    """The candidates that the table which ships for this kind of device knows to be far behind."""
    entry = dispatch.nearest(problem, dispatch.table(problem.device), exact=False)
    times = entry.microseconds if entry is not None else {}
    return {name for name, time in times.items() if time > HOPELESS * min(times.values())}


def time_candidates(problem: Problem, without: Collection[str] = ()) -> dict[str, float]:
    """Microseconds by candidate, measured now and not remembered; empty if there is only one."""
    return _times(problem, _able(problem, without))


def _able(problem: Problem, without: Collection[str]) -> list[Candidate]:
    known = dispatch.candidates(problem.op, problem.device)
    return [c for c in known if c.run and c.name not in without and c.declines(problem) is None]


def _times(problem: Problem, able: Sequence[Candidate]) -> dict[str, float]:
    make = _MAKERS.get(problem.op)
    if len(able) < 2 or make is None:
        return {}
    with torch.no_grad(), torch.inference_mode(False):
        call = make(problem)
        return tuning.time_all({c.name: _bound(call, c) for c in able}, problem.device)


def _bound(call: Callable[[Candidate], object], candidate: Candidate) -> Callable[[], object]:
    return lambda: call(candidate)


def _random(problem: Problem, *shape: int) -> Tensor:
    return torch.randn(*shape, device=problem.device).to(problem.dtype)


def _dense(problem: Problem) -> Callable[[Candidate], object]:
    x, weight = _random(problem, problem.m, problem.k), _random(problem, sum(problem.n), problem.k)
    return lambda candidate: candidate.run(x, weight, None)  # type: ignore[misc]


def _attention(problem: Problem) -> Callable[[Candidate], object]:
    """Eight heads, forward and backward: what counts is how the times of the candidates compare."""
    q = _random(problem, 1, 8, problem.m, problem.k)
    k, v = (_random(problem, 1, 8, sum(problem.n), problem.k) for _ in range(2))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    dout = _random(problem, *q.shape)

    @torch.enable_grad()
    def call(candidate: Candidate) -> object:
        out = candidate.run(*inputs, None, True, problem.k**-0.5)  # type: ignore[misc]
        return torch.autograd.grad(out, inputs, dout)

    return call


def _lora(problem: Problem) -> Callable[[Candidate], object]:
    group = _group(problem)
    x = _random(problem, problem.m, problem.k)
    if problem.op == "lora_linear":
        return lambda candidate: candidate.run(group, x, [])  # type: ignore[misc]
    dys = [_random(problem, problem.m, n) for n in problem.n]
    h = _random(problem, problem.m, problem.rank)
    return lambda candidate: candidate.run(group, dys, x, h, True, True)  # type: ignore[misc]


def _experts(problem: Problem) -> Callable[[Candidate], object]:
    """Four experts with a quarter of the rows each, stored as [E, N, K]: what counts is how the candidates compare."""
    data, count = _group(problem._replace(n=problem.n * EXPERTS, rank=0)), EXPERTS
    offsets = torch.arange(1, count + 1, device=problem.device) * problem.m // count
    parts = (data.absmax, data.absmax_scale, data.absmax_offset) if data.absmax else ()
    (n,), k, rank, adapted = problem.n, problem.k, problem.rank, int(problem.rank > 0)
    factors = [torch.randn(count, *shape, device=problem.device) for shape in ((rank, k), (n, rank))]
    a, b = ([factor][:adapted] for factor in factors)
    group = ExpertGroup(
        offsets, torch.stack(list(data.weight)), [torch.stack(list(part)) for part in parts], a, b,
        [torch.ones(())] * adapted, [1.0] * adapted, (n, k), False, problem.quant_type, problem.block_size, problem.dtype,
    )  # fmt: skip
    x = _random(problem, problem.m, k)
    if problem.op == "grouped_lora_linear":
        return lambda candidate: candidate.run(group, x)  # type: ignore[misc]
    dy, h = _random(problem, problem.m, n), _random(problem, problem.m, rank)
    return lambda candidate: candidate.run(group, dy, x, h, True, True)  # type: ignore[misc]


_MAKERS = {
    **dict.fromkeys(("lora_linear", "lora_linear_backward"), _lora),
    **dict.fromkeys(("grouped_lora_linear", "grouped_lora_linear_backward"), _experts),
    "dense_linear": _dense,
    "attention": _attention,
}


def _group(problem: Problem) -> LoRAGroup:
    """One adapter of all the ranks, on the first linear."""
    on: dict[str, Any] = {"device": problem.device}
    quantized = problem.quant_type != "none"
    weight, absmax, scale, offset = [], [], [], []
    for n in problem.n:
        if not quantized:
            weight.append(_random(problem, n, problem.k))
            continue
        blocks = -(-n * problem.k // problem.block_size)
        weight.append(torch.randint(0, 256, ((n * problem.k + 1) // 2,), dtype=torch.uint8, **on))
        absmax.append(torch.randint(0, 256, (blocks,), dtype=torch.uint8, **on))
        scale.append(torch.rand(-(-blocks // SCALE_BLOCK_SIZE), **on))
        offset.append(torch.rand((), **on))
    adapted = problem.rank > 0
    return LoRAGroup(
        weight, absmax, scale, offset,
        [torch.randn(problem.rank, problem.k, **on)] if adapted else [],
        [torch.randn(problem.n[0], problem.rank, **on)] if adapted else [],
        [], [1.0] if adapted else [], [int(adapted and i == 0) for i in range(len(problem.n))],
        [torch.tensor(1)] if adapted and problem.dropout else [], 0.1 if problem.dropout else 0.0,
        list(problem.n), problem.quant_type, problem.block_size, problem.dtype,
    )  # fmt: skip
