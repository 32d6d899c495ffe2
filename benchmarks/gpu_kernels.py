"""Every kernel of this device: its numbers against fp64, its time beside the library's bf16 product and bitsandbytes.

Used by gpu.py. M rows of x, N output features, K input features.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bounds import Speeds, Work
from torch import Tensor

import qlora_compile as qc
from qlora_compile.lora_group import LoRAGroup
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import dispatch, tuning
from qlora_compile.runtime.kernels.dispatch import Problem

RANK = 16
DX = "lora_linear_backward, dX only"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str, *, rounds: int = 20, budget_s: float = 0.3) -> float:
    """Median of at most `rounds` calls after two that warm up.

    On CUDA the call is captured as a graph and the graph is timed by events: what the device needs, without Python and
    the launches, which would hide every kernel shorter than they are.
    """
    for _ in range(2):
        call()
    synchronize(device)
    if device != "cuda":
        return _median(functools.partial(_timed, call), rounds, budget_s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return _median(functools.partial(_timed_on_cuda, graph.replay), rounds, budget_s)


def _timed(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def _timed_on_cuda(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _median(once: Callable[[], float], rounds: int, budget_s: float) -> float:
    """Of what `once` says, at most `rounds` times and until the budget is used up."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < rounds and (not times or time.perf_counter() - begin < budget_s):
        times.append(once())
    return statistics.median(times)


def group_of(sizes: Sequence[int], k: int, device: str, dropout: float = 0.0) -> tuple[LoRAGroup, list[Tensor]]:
    """A random group of quantized linears with an adapter each, bf16, and its dense bf16 weights."""
    data, dense = [], []
    for n in sizes:
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / math.sqrt(k)
        q = qc.quantize_4bit(weight)
        data.append(q)
        dense.append(qc.dequantize_4bit(q))
    on: dict[str, Any] = {"device": device}
    group = LoRAGroup(
        [q.codes for q in data], [q.absmax for q in data], [q.absmax_scale for q in data],
        [q.absmax_offset for q in data],
        [torch.randn(RANK, k, **on) / math.sqrt(k) for _ in sizes], [torch.randn(n, RANK, **on) / 4 for n in sizes],
        [torch.ones((), **on) for _ in sizes], [2.0] * len(sizes), [1] * len(sizes),
        [torch.tensor(7 + i) for i in range(len(sizes))] if dropout else [], dropout, list(sizes), "nf4", 64,
        torch.bfloat16,
    )  # fmt: skip
    return group, dense


def able(op: str, group: LoRAGroup, m: int, k: int, device: str) -> Iterator[dispatch.Candidate]:
    problem = problem_of(op, group, m, k, device)
    for candidate in dispatch.candidates(op, device):
        if candidate.run is not None and candidate.declines(problem) is None:
            yield candidate


def problem_of(op: str, group: LoRAGroup, m: int, k: int, device: str) -> Problem:
    sizes = tuple(group.out_features)
    rank = sum(group.ranks())
    return Problem(op, dispatch.bucket(m), sizes, k, rank, torch.bfloat16, "nf4", 64, device, bool(group.dropout))


def check(device: str, report: Callable[[str], None]) -> list[str]:
    """Every candidate at odd sizes against fp64. Returns what is wrong."""
    wrong = []
    for op in ("dequantize_4bit", "quantize_4bit", "paged_step"):
        if kernels.find(op, device) is None:
            wrong.append(f"{op}: no kernel that gives the reference's numbers")
    for m, sizes, k, dropout in ((1, (70, 33), 96, 0.0), (5, (33,), 160, 0.0), (67, (48, 21, 9), 224, 0.25)):
        group, dense = group_of(sizes, k, device, dropout)
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        dys = [torch.randn(m, n, device=device, dtype=torch.bfloat16) for n in sizes]
        ys, dx, h = exact(group, dense, x, dys)
        for again in ("", " again"):  # launches that are found again go another way
            for candidate in able("lora_linear", group, m, k, device):
                got = candidate.run(group, x, [])[0]  # type: ignore[misc]
                wrong += compare(f"lora_linear {candidate.name} M={m}{again}", got, ys, report)
            for candidate in able("lora_linear_backward", group, m, k, device):
                got = candidate.run(group, dys, x, h, True, True)[0]  # type: ignore[misc]
                wrong += compare(f"lora_linear_backward {candidate.name} M={m}{again}", [got], [dx], report)
    return wrong


def exact(group: LoRAGroup, dense: list[Tensor], x: Tensor, dys: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(y_i, dx, h) in fp64 from the same weights and masks; h in bf16, as kernels get it."""
    wide, low = x.double().requires_grad_(), []
    ys = []
    for i, weight in enumerate(dense):
        dropped = wide * group.mask(i, x).double() if group.dropout else wide
        h = dropped @ group.lora_a[i].double().t()
        low.append(h)
        ys.append(wide @ weight.double().t() + 2.0 * h @ group.lora_b[i].double().t())
    torch.autograd.backward(ys, [dy.double() for dy in dys])
    assert wide.grad is not None
    return [y.detach() for y in ys], wide.grad, torch.cat(low, 1).detach().to(x.dtype)


def compare(name: str, got: list[Tensor], expected: list[Tensor], report: Callable[[str], None]) -> list[str]:
    """Relative to the largest value: bf16 keeps 8 bits, and a result passes through three roundings (h or g, x, y)."""
    error = max(((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected, strict=True))
    report(f"  {name}: largest error {error:.1e} of the largest value")
    return [] if error < 3 * 2**-8 else [f"{name}: error {error:.1e} of the largest value"]


def speeds(device: str, small: bool) -> Speeds:
    """Copy and read bandwidth and the library's rate on this device, by the timer that times the kernels."""
    return Speeds.measure(lambda call: seconds(call, device), device, small=small)


def dequantize_row(device: str, n: int, k: int, speeds: Speeds) -> dict[str, Any]:
    """Dequantize (double-quantized scales) into a reused buffer, beside a copy that moves as many bytes."""
    q = qc.quantize_4bit(torch.randn(n, k, device=device, dtype=torch.bfloat16))
    out = torch.empty(n, k, device=device, dtype=torch.bfloat16)
    moved = n * k * 2 + sum(t.numel() * t.element_size() for t in (q.codes, q.absmax, q.absmax_scale))
    source = torch.empty(moved // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    row = {"op": "dequantize_4bit", "n": n, "k": k, "bytes": moved}
    row["ours_us"] = 1e6 * seconds(lambda: qc.dequantize_4bit(q, out=out), device)
    row["copy_us"] = 1e6 * seconds(lambda: target.copy_(source), device)
    peer = bitsandbytes_dequantize(out)
    if peer is not None:
        row["bitsandbytes_us"] = 1e6 * seconds(peer, device)
    bound = speeds.explain(Work(moved - out.nbytes, out.nbytes), row["ours_us"] / 1e6)
    return row | {"of_copy_bandwidth": row["copy_us"] / row["ours_us"], "bound": bound}


def bitsandbytes_dequantize(weight: Tensor) -> Callable[[], object] | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return lambda: functional.dequantize_4bit(codes, state)


def linear_rows(
    device: str,
    rows_of_x: Sequence[int],
    groups: Sequence[tuple[tuple[int, ...], int]],
    out_of_time: Callable[[], bool],
    speeds: Speeds,
) -> list[dict[str, Any]]:
    """Every candidate, forward and backward, beside the library's bf16 product with a dense weight (no adapter)."""
    found = []
    made = [group_of(sizes, k, device) for sizes, k in groups]
    for m in rows_of_x:
        for group, dense in made:
            if out_of_time():
                return found
            found += linear_row(device, group, torch.cat(dense), m, speeds)
    return found


def linear_row(device: str, group: LoRAGroup, joined: Tensor, m: int, speeds: Speeds) -> list[dict[str, Any]]:
    """Forward and backward at one number of rows; `joined` [sum N, K] is the group's dense weight."""
    sizes, k = group.out_features, joined.shape[1]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    dys = [torch.randn(m, n, device=device, dtype=torch.bfloat16) for n in sizes]
    h, joined_dy = torch.randn(m, RANK * len(sizes), device=device, dtype=torch.bfloat16), torch.cat(dys, 1)
    works: dict[str, tuple[Callable[[], object], tuple[Any, ...]]] = {
        "lora_linear": (lambda: x @ joined.t(), (group, x, [])),
        "lora_linear_backward": (lambda: joined_dy @ joined, (group, dys, x, h, True, True)),
    }
    if m >= 2048:  # the limit is on y and dX alone
        works[DX] = works["lora_linear_backward"][0], (group, dys, x, h, True, False)
    found = []
    for op, (dense_call, args) in works.items():
        times = {}
        for candidate in able("lora_linear_backward" if op == DX else op, group, m, k, device):
            call = functools.partial(candidate.run, *args)  # type: ignore[arg-type]
            times[candidate.name] = round(1e6 * seconds(call, device), 1)
        best = min(times, key=times.__getitem__)
        row = {"op": op, "m": m, "n": list(sizes), "k": k, "dense_bf16_us": 1e6 * seconds(dense_call, device)}
        bound = speeds.explain(group_work(group, m, k, op), times[best] / 1e6)
        found.append(
            row | {"us": times, "best": best, "dense_over_best": row["dense_bf16_us"] / times[best], "bound": bound}
        )
    return found


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


def shares_of_the_library(rows: list[dict[str, Any]]) -> list[str]:
    """y and dX of many rows beside the library's two products with the dense weight, in words."""
    said = []
    for dx in (row for row in rows if row["op"] == DX):
        same = (row for row in rows if row["op"] == "lora_linear" and all(row[key] == dx[key] for key in "mnk"))
        for forward in same:
            dense = forward["dense_bf16_us"] + dx["dense_bf16_us"]
            ours = forward["us"][forward["best"]] + dx["us"][dx["best"]]
            said.append(f"y and dX, M={dx['m']} N={dx['n']} K={dx['k']}: {dense / ours:.2f} of cuBLAS (limit 0.90)")
    return said


def table_entries(rows: list[dict[str, Any]], device: str) -> list[tuning.Entry]:
    """The rows as lines of a dispatch table (`runtime/kernels/tables/<kind>.json`)."""
    out = []
    for row in rows:
        if row["op"] == DX:
            continue
        ranks = RANK * len(row["n"])
        problem = Problem(
            row["op"], dispatch.bucket(row["m"]), tuple(row["n"]), row["k"], ranks, torch.bfloat16, "nf4", 64, device
        )
        out.append(dispatch.entry_of(problem, row["us"]))
    return out
