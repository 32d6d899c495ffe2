"""Dequantize beside a copy, and every kernel of a linear with adapters beside the library's bf16 product: us and bounds.

Used by gpu.py. M rows of x, N output features, K input features.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bounds import Speeds, Work, copy_seconds
from gpu_kernels import RANK, able, bound_to, group_of, guarded
from gpu_timing import seconds
from torch import Tensor

import qlora_compile as qc
from qlora_compile.lora_group import LoRAGroup
from qlora_compile.runtime.kernels import dispatch, tuning
from qlora_compile.runtime.kernels.dispatch import Problem

DX = "lora_linear_backward, dX only"
CHAINED = 10  # 84 MB of codes of the smallest linear
MANY = 2048  # rows from which on the limit is the library's product
# with many rows they lost to the library's product by factors of 2 to 5 everywhere (results/gpu_h200_first.json)
ONLY_FEW = ("triton_gemm", "triton_dx")


def measured_speeds(device: str, small: bool) -> Speeds:
    """Copy and read bandwidth and the library's rate on this device, by the timer that times the kernels."""
    return Speeds.measure(lambda call: seconds(call, device), device, small=small)


def dequantize_row(device: str, n: int, k: int, speeds: Speeds, wrong: Callable[[str], None]) -> dict[str, Any]:
    """Dequantize (double-quantized scales) into a reused buffer, beside a copy that moves as many bytes."""
    q = qc.quantize_4bit(torch.randn(n, k, device=device, dtype=torch.bfloat16))
    out = torch.empty(n, k, device=device, dtype=torch.bfloat16)
    moved = n * k * 2 + sum(t.numel() * t.element_size() for t in (q.codes, q.absmax, q.absmax_scale))
    source = torch.zeros(moved // 16, device=device, dtype=torch.int64)
    target = torch.empty_like(source)
    row = {"op": "dequantize_4bit", "n": n, "k": k, "bytes": moved}
    row["ours_us"] = 1e6 * seconds(lambda: qc.dequantize_4bit(q, out=out), device)
    row["copy_us"] = 1e6 * copy_seconds(lambda call: seconds(call, device), source, target)
    if importlib.util.find_spec("bitsandbytes") is not None:
        peer_s = guarded(f"bitsandbytes' dequantize {n}x{k}", device, wrong, lambda: peer_seconds(out, device))
        row |= {} if peer_s is None else {"bitsandbytes_us": 1e6 * peer_s}
    bound = speeds.explain(Work(moved - out.nbytes, out.nbytes), row["ours_us"] / 1e6)
    return row | {"of_copy_bandwidth": row["copy_us"] / row["ours_us"], "bound": bound}


def peer_seconds(weight: Tensor, device: str) -> float:
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return seconds(lambda: functional.dequantize_4bit(codes, state), device)


Timer = Callable[[Callable[[], object], str], float]


def once(call: Callable[[], object], device: str) -> float:
    """Not timed: what it needs is compiled then."""
    call()
    return math.nan


def linear_row(
    device: str,
    group: LoRAGroup,
    dense: Tensor,
    m: int,
    speeds: Speeds | None,
    wrong: Callable[[str], None],
    timer: Timer = seconds,
) -> list[dict[str, Any]]:
    """Forward and backward at one number of rows, every candidate; `dense` [sum N, K] is the group's weight. The library's
    product has no adapter. A candidate that raises is told to `wrong`, and the row goes on without it."""
    sizes, k = group.out_features, dense.shape[1]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    dys = [torch.randn(m, n, device=device, dtype=torch.bfloat16) for n in sizes]
    h, joined = torch.randn(m, RANK * len(sizes), device=device, dtype=torch.bfloat16), torch.cat(dys, 1)
    works: dict[str, tuple[Callable[[], object], tuple[Any, ...]]] = {
        "lora_linear": (lambda: x @ dense.t(), (group, x, [])),
        "lora_linear_backward": (lambda: joined @ dense, (group, dys, x, h, True, True)),
    }
    if m >= MANY:  # the limit is on y and dX alone
        works[DX] = works["lora_linear_backward"][0], (group, dys, x, h, True, False)
    found = []
    for op, (product, args) in works.items():
        row = {"op": op, "m": m, "n": list(sizes), "k": k, "dense_bf16_us": 1e6 * timer(product, device)}
        row["us"] = times = candidate_times(device, op, group, m, k, args, wrong, timer)
        row["best"] = best = min(times, key=times.__getitem__, default=None)
        if best is not None:
            row["dense_over_best"] = row["dense_bf16_us"] / times[best]
        if best is not None and speeds is not None:
            row["bound"] = speeds.explain(group_work(group, m, k, op), times[best] / 1e6)
        found.append(row)
    return found


def chained_row(
    device: str, sizes: Sequence[int], k: int, wrong: Callable[[str], None], count: int = CHAINED
) -> dict[str, Any]:
    """Microseconds of one of `count` calls for one token, each on weights of its own, more of them than the L2 holds: what
    a linear costs a model, while a single call's graph has its start to pay, too."""
    made = [group_of(sizes, k, device) for _ in range(count)]
    x = torch.randn(1, k, device=device, dtype=torch.bfloat16)
    dense = [torch.cat(weights) for _, weights in made]
    row: dict[str, Any] = {"m": 1, "n": list(sizes), "k": k, "count": count, "us": {}}
    chains = {"dense_bf16": [functools.partial(torch.matmul, x, weight.t()) for weight in dense]}
    for candidate in able("lora_linear", made[0][0], 1, k, device):
        chains[candidate.name] = [bound_to(candidate, group, x, []) for group, _ in made]

    def one_after_the_other(calls: list[Callable[[], Any]]) -> None:
        for call in calls:
            call()

    for name, calls in chains.items():
        chain = functools.partial(one_after_the_other, calls)
        what = f"{count} calls of {name} N={sizes} K={k}"
        time_s = guarded(what, device, wrong, functools.partial(seconds, chain, device, budget_s=0.15))
        if time_s is not None:
            row["us"][name] = round(1e6 * time_s / count, 2)
    return row


def candidate_times(
    device: str,
    op: str,
    group: LoRAGroup,
    m: int,
    k: int,
    args: tuple[Any, ...],
    wrong: Callable[[str], None],
    timer: Timer,
) -> dict[str, float]:
    """Microseconds by candidate, of those that did not raise."""
    times = {}
    for candidate in able("lora_linear_backward" if op == DX else op, group, m, k, device):
        if m >= MANY and candidate.name in ONLY_FEW:
            continue
        call = bound_to(candidate, *args)
        name = f"timing {op} {candidate.name} M={m} N={group.out_features} K={k}"
        time_s = guarded(name, device, wrong, functools.partial(timer, call, device))
        if time_s is not None:
            times[candidate.name] = round(1e6 * time_s, 1)
    return times


def group_work(group: LoRAGroup, m: int, k: int, op: str) -> Work:
    """Every weight and factor read once, x read and y written; backward: dy and x read, dx, dA and dB written."""
    parts = [Work.of_linears(m, n, k, ranks=RANK) for n in group.out_features]
    read, written = sum(part.read for part in parts), sum(part.written for part in parts)
    x, factors = 2 * m * k, sum(4 * RANK * (n + k) for n in group.out_features)
    read -= x * (len(parts) - 1)  # shared
    operations = sum(part.operations for part in parts)
    if op == "lora_linear":
        return Work(read, written, operations)
    if op == DX:
        return Work(read + written - x, x, operations)
    low_rank = sum(2 * m * RANK * (n + k) for n in group.out_features)
    return Work(read + written, x + factors, operations + low_rank)


def table_entries(rows: list[dict[str, Any]], device: str) -> list[tuning.Entry]:
    """The rows as lines of a dispatch table (`runtime/kernels/tables/<kind>.json`)."""
    out = []
    for row in rows:
        if row["op"] == DX or not row["us"]:
            continue
        ranks = RANK * len(row["n"])
        problem = Problem(
            row["op"], dispatch.bucket(row["m"]), tuple(row["n"]), row["k"], ranks, torch.bfloat16, "nf4", 64, device
        )
        out.append(dispatch.entry_of(problem, row["us"]))
    return out
