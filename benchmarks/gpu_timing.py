"""Seconds of a call as the device takes them, and what else a bound is made of: launches.

On CUDA a call is captured as a graph and the graph is timed by events, behind a sweep over more memory than the L2 holds.
Used by gpu.py.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 29  # ten times the L2 of an H200
CHAIN = 100  # kernels in the graph that says what one more of them takes


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def synchronize_stream(device: str) -> None:
    """Only the stream that computes."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


def seconds(call: Callable[[], object], device: str, *, rounds: int = 20, budget_s: float = 0.3) -> float:
    """Median of at most `rounds` calls after two that warm up.

    On CUDA: of replays of a graph of the call, each with cold caches and launched while the device is still busy with
    `flush`. What the device needs, then, without Python and without the host's launches, which would hide every kernel
    shorter than they are; what remains is the start of a graph (`launch_times`: "one_us").
    """
    for _ in range(2):
        call()
    synchronize(device)
    if device != "cuda":
        return median(functools.partial(_timed, call), rounds, budget_s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median(functools.partial(timed_on_cuda, graph.replay), rounds, budget_s)


def flush() -> None:
    """Writes and then reads more than the L2 holds: no operand is left in it, nor a line that has still to be written."""
    buffer = _flush_buffer()
    buffer.zero_()
    buffer.sum()


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")


def _timed(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def timed_on_cuda(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def median(once: Callable[[], float], rounds: int, budget_s: float) -> float:
    """Of what `once` says, at most `rounds` times and until the budget is used up."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < rounds and (not times or time.perf_counter() - begin < budget_s):
        times.append(once())
    return statistics.median(times)


def launch_times(device: str) -> dict[str, float]:
    """Microseconds of a kernel that does next to nothing: alone in a graph, one more in a graph, and launched by Python."""
    tiny = torch.zeros(32, device=device)

    def chain() -> None:
        for _ in range(CHAIN + 1):
            tiny.add_(1)

    one = seconds(lambda: tiny.add_(1), device)
    more = seconds(chain, device)
    synchronize(device)
    begin = time.perf_counter()
    chain()  # the device's queue takes that many without waiting
    host = time.perf_counter() - begin
    synchronize(device)
    return {"one_us": 1e6 * one, "next_us": 1e6 * (more - one) / CHAIN, "host_us": 1e6 * host / (CHAIN + 1)}
