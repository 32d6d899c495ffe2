"""Training with AdamW's states resident and with them paged to pinned memory: peak of the device's memory and a step's time.

Used by gpu.py. A narrow Llama and r=64, so that the states are a third of the peak; micro-batches are accumulated as
QLoRA runs do, for a GPU computes one of this size in less than the time that its states take over PCIe.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from gpu_models import clean, llama

import qlora_compile as qc

NARROW = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
}
LAYERS, RANK, TOKENS, MICRO_BATCHES = 32, 64, (1, 128), 8
CONTENDERS = ("resident", "paged")
SHARE = 8  # the budget is this part of the states


def run(name: str, shape: dict[str, int], layers: int, micro_batches: int, device: str, steps: int) -> dict[str, Any]:
    """Median step, losses, bytes: of the states, and on CUDA of the peak."""
    clean(device)
    torch.manual_seed(0)
    config = qc.QLoRAConfig(r=RANK, lora_alpha=2 * RANK, keep_logits=False)
    model = qc.prepare(llama(shape, layers, device), config).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    states = 8 * sum(p.numel() for p in adapters)
    if name == "paged":
        optimizer: Any = qc.PagedAdamW(adapters, lr=1e-4, device_budget=states // SHARE)
    else:
        optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)
    compiled = torch.compile(model, backend="qlora")
    ids = torch.randint(0, shape["vocab_size"], (micro_batches, *TOKENS), device=device)
    times, losses = [], []
    for number in range(steps + 2):
        if number == 2 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of training, not of the dense model or of compiling
        begin = time.perf_counter()
        total = torch.zeros((), device=device)
        for part in ids:
            loss = compiled(input_ids=part, labels=part).loss / micro_batches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())  # waits for the device
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    found = {"step_s": statistics.median(times[2:]), "state_bytes": states, "peak_bytes": peak, "loss": losses[-1]}
    return found | ({"moved_in_bytes": optimizer.statistics().moved_in_bytes} if name == "paged" else {})


def lines(found: dict[str, Any]) -> list[str]:
    """Ratios and limits, in words."""
    base, paged = (found[name] for name in CONTENDERS)
    said = [
        f"paged step {paged['step_s'] * 1e3:.1f} ms, {paged['step_s'] / base['step_s']:.3f} of resident (limit 1.05)",
        f"paged loss {paged['loss']:.6f}, resident {base['loss']:.6f}",
    ]
    if base["peak_bytes"]:
        share, ratio = base["state_bytes"] / base["peak_bytes"], paged["peak_bytes"] / base["peak_bytes"]
        said.append(f"states {share:.2f} of the peak (at least 0.33), peak paged / resident {ratio:.2f} (limit 0.75)")
    return said
