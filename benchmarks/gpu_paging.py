"""Training with AdamW's states resident or paged to pinned memory: the device's peak, a step's time, bytes that move.

The states have to be a third of the resident peak, with r=64 on all linears. Of the 20 bytes that a parameter of an adapter
takes (itself, its gradient, the next micro-batch's, two states) they are 8. So the 4-bit base must be small beside its
adapters, N K / 2 bytes against 20 r (N + K): hidden size 128 and a very wide MLP, four layers for 406 MB of states (more
layers take longer to compile than to train). On an H200 they are 0.33 of the peak. Sixteen micro-batches, as training
accumulates them: a step of one is little more than its optimizer's.

Used by gpu.py, which gives each of the two a process of its own.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_floors import linears
from gpu_models import Shape, Step, llama, stepper, timed_steps, trainable
from gpu_timing import synchronize, synchronize_stream

import qlora_compile as qc

NARROW = {
    "hidden_size": 128,
    "intermediate_size": 65536,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
LAYERS, RANK, TOKENS, MICRO_BATCHES = 4, 64, (1, 128), 16
BUDGET = 8  # the device keeps this part of the states


def run(
    name: str, shape: Shape, layers: int, device: str, steps: int, turn: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], Step, torch.optim.Optimizer]:
    """Median step, losses, peaks, bytes of the states and of what moves in a step; and the step and its optimizer, to be
    profiled."""
    torch.manual_seed(0)
    config = qc.QLoRAConfig(r=RANK, lora_alpha=2 * RANK, keep_logits=False)
    model = qc.prepare(llama(shape, layers, device), config).train()
    adapters = trainable(model)
    states = 8 * sum(p.numel() for p in adapters)
    paged = qc.PagedAdamW(adapters, lr=1e-4, device_budget=states // BUDGET) if name == "paged" else None
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True) if paged is None else paged
    ids = torch.randint(0, shape["vocab_size"], (MICRO_BATCHES, *TOKENS), device=device)
    step = stepper(model, optimizer, "qlora", list(ids))
    found = (
        timed_steps(step, device, steps, turn) | {"state_mb": states / 1e6} | optimizer_times(step, optimizer, device)
    )
    if paged is not None:
        before = moved_mb(paged)
        step()
        found |= {key: value - before[key] for key, value in moved_mb(paged).items()}
    return found, step, optimizer


def optimizer_times(step: Step, optimizer: torch.optim.Optimizer, device: str, steps: int = 5) -> dict[str, float]:
    """Medians of what `optimizer.step()` takes of a step: the host's own time; until the stream that computes is done,
    where the next step may begin; and all of it, alone on the device."""
    times: dict[str, list[float]] = {"optimizer_host_s": [], "optimizer_stream_s": [], "optimizer_s": []}
    begin = list[float]()

    def before(*_: Any) -> None:
        synchronize(device)
        begin.append(time.perf_counter())

    def after(*_: Any) -> None:
        waits = (lambda: None, functools.partial(synchronize_stream, device), functools.partial(synchronize, device))
        for wait, found in zip(waits, times.values()):
            wait()
            found.append(time.perf_counter() - begin[-1])

    hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    for _ in range(steps):
        step()
    for hook in hooks:
        hook.remove()
    return {name: statistics.median(found) for name, found in times.items()}


def all_there(step: Step, optimizer: Any, device: str) -> dict[str, float]:
    """`optimizer_times` without a budget: the kernel, its table and Python, and no copies."""
    optimizer.pool.budget = None
    step()
    return optimizer_times(step, optimizer, device)


def alone(device: str, shape: Shape, layers: int, priority: int = 0) -> tuple[Step, Any]:
    """The paged optimizer of `run` without its model: a step on gradients that stay, begun as a backward pass leaves it.
    `priority` is that of the streams which copy."""
    sizes = [size for _ in range(layers) for n, k in linears(shape) for size in ((RANK, k), (n, RANK))]
    adapters = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
    for parameter in adapters:
        parameter.grad = torch.ones_like(parameter)
    budget = 8 * sum(p.numel() for p in adapters) // BUDGET
    before, torch.cuda.Stream = torch.cuda.Stream, functools.partial(torch.cuda.Stream, priority=priority)  # type: ignore[misc]
    try:
        optimizer = qc.PagedAdamW(adapters, lr=1e-4, device_budget=budget)
    finally:
        torch.cuda.Stream = before  # type: ignore[misc]

    def step() -> float:
        optimizer.pager.prefetch(range(len(adapters)))
        optimizer.step()
        return 0.0

    return step, optimizer


def moved_mb(optimizer: Any) -> dict[str, float]:
    """So far, to the device and from it."""
    counted = optimizer.statistics()
    return {"moved_in_mb": counted.moved_in_bytes / 1e6, "moved_out_mb": counted.moved_out_bytes / 1e6}
