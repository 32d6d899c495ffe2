"""Where one step's time goes: on the device by kernel, in Python by function. Used by gpu.py."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COPIES = ("Memcpy", "Memset")


def on_device(step: Callable[[], object], device: str, most: int = 20) -> dict[str, Any]:
    """ms of the kernels of one step, how many are launched, the longest of them, and ms of copies (which overlap them). On
    a CPU: of torch's operators."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [(e.key[:90], getattr(e, spent) / 1e3, e.count) for e in profile.key_averages() if getattr(e, spent) > 0]
    kernels = sorted((row for row in rows if not row[0].startswith(COPIES)), key=lambda row: -row[1])
    return {
        "device_ms": sum(ms for _, ms, _ in kernels),
        "launches": sum(count for *_, count in kernels),
        "copies_ms": sum(ms for key, ms, _ in rows if key.startswith(COPIES)),
        "kernels": kernels[:most],
    }


def in_python(step: Callable[[], object], most: int = 20) -> dict[str, Any]:
    """ms of one step by function, slowed down by its profiler, about twofold where calls are short. Its backward pass runs
    on this thread: cProfile does not see autograd's."""
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profiler.runcall(step)
    functions: list[tuple[str, float, int]] = []
    for (path, _, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        functions.append((f"{'/'.join(Path(path).parts[-2:])}:{name}"[:90], own * 1e3, calls))
    functions.sort(key=lambda row: -row[1])
    return {"python_ms": sum(row[1] for row in functions), "functions": functions[:most]}
