"""Training with AdamW's states resident or paged to pinned memory: the device's peak, a step's time, bytes that move.

The states have to be a third of the resident peak, with r=64 on all linears. Of the 20 bytes that a parameter of an adapter
takes (itself, its gradient, the next micro-batch's, two states) they are 8. So the 4-bit base must be small beside its
adapters, N K / 2 bytes against 20 r (N + K): hidden size 128 and a very wide MLP, four layers for 406 MB of states (more
layers take longer to compile than to train). On an H200 they are 0.33 of the peak. Sixteen micro-batches, as training
accumulates them: a step of one is little more than its optimizer's.

Used by gpu.py, which gives each of the two a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_models import Shape, Step, llama, stepper, timed_steps, trainable
from gpu_timing import synchronize

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
) -> tuple[dict[str, Any], Step]:
    """Median step, losses, peaks, bytes of the states and of what moves in a step; and the step, to be profiled."""
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
    return found, step


def optimizer_times(step: Step, optimizer: torch.optim.Optimizer, device: str, steps: int = 5) -> dict[str, float]:
    """Medians of what `optimizer.step()` takes of a step: the host's own time, and all of it, alone on the device."""
    host, whole, begin = list[float](), list[float](), list[float]()

    def before(*_: Any) -> None:
        synchronize(device)
        begin.append(time.perf_counter())

    def after(*_: Any) -> None:
        host.append(time.perf_counter() - begin[-1])
        synchronize(device)
        whole.append(time.perf_counter() - begin[-1])

    hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    for _ in range(steps):
        step()
    for hook in hooks:
        hook.remove()
    return {"optimizer_host_s": statistics.median(host), "optimizer_s": statistics.median(whole)}


def moved_mb(optimizer: Any) -> dict[str, float]:
    """So far, to the device and from it."""
    counted = optimizer.statistics()
    return {"moved_in_mb": counted.moved_in_bytes / 1e6, "moved_out_mb": counted.moved_out_bytes / 1e6}
