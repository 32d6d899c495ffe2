"""The paged optimizer beside its peers, in one run: the step alone, whole training, losses, and the activation budget.

    python benchmarks/paging.py [--part step|training|losses|activations] [--model DIR] [--json FILE]

step         one optimizer step with all of its state resident, 59 M parameters in LoRA shapes, contenders in turns; then
             ours by instruction set
training     a narrow Llama (24 layers of 512, 2048 tokens in its vocabulary), r=64 on all linears, so that the states are a
             third of the peak: device-tier bytes (what torch's allocator has for model, gradients, activations and states,
             the file of pages apart) at their peak, and the time of a step; AdamW's states resident (torch, fused), paged
             to a file, and stepped in backward
losses       its first two layers, 200 steps on speeches: 32-bit states, the same with a quarter of them on the device, 8-bit
activations  its first eight layers compiled by Inductor, activation_budget 1.0 and 0.3: what the forward pass keeps
             for the backward pass, as torch's allocator counts it, and the time of a step

Without --part all four, each contender but the step's in a process of its own. Each line ends with the limit that the
project set itself. `training` runs the graphs of AOTAutograd without Inductor: it compares our own runs with each other,
and compiles in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import cut, llama_shape, smollm2, write_results
from limits import entry, show_limits
from paging_runs import BUDGET, BUDGETS, LOSSES, TRAINING, worker

NARROW = {"hidden": 512, "mlp": 1408, "layers": 24, "heads": 8, "vocabulary": 2048}  # of `training`
SHAPES = [
    shape for _ in range(24) for shape in ((64, 4096), (4096, 64), (64, 4096), (11008, 64), (64, 11008), (256, 1024))
]


# --- the step alone --------------------------------------------------------------------------------------------------


def optimizers() -> dict[str, Callable[[Any], Any]]:
    """By name, from parameters."""
    import bitsandbytes
    import torch

    import qlora_compile as qc

    return {
        "ours, 32-bit": lambda p: qc.PagedAdamW(p, lr=1e-4),
        "ours, 8-bit": lambda p: qc.PagedAdamW(p, lr=1e-4, state_bits=8),
        "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "torch foreach": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=True),
        "bitsandbytes 8-bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-4),
    }


def step_alone(rounds: int) -> dict[str, Any]:
    """Median and least ms of a step by optimizer, all in one process, taking turns; bytes of state."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator)
    times: dict[str, list[float]] = {}
    made = {name: make(values) for name, make in optimizers().items()}
    for turn in range(rounds + 1):
        for name, optimizer in made.items():
            for _ in range(2):  # the first of a turn finds another one's state in the cache
                begin = time.perf_counter()
                optimizer.step()
                ms = (time.perf_counter() - begin) * 1e3
            if turn:
                times.setdefault(name, []).append(ms)
    by_path = ours_by_path([made["ours, 32-bit"], made["ours, 8-bit"]], rounds)
    numel = sum(value.numel() for value in values)
    found: dict[str, Any] = {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms)} for name, ms in times.items()
    }
    for name in ("ours, 32-bit", "ours, 8-bit"):
        found[name]["state_bytes"] = made[name].statistics().device_bytes
    found["parameters"] = numel
    found["by_path"] = by_path
    return found


def ours_by_path(made: list[Any], rounds: int) -> dict[str, list[float]]:
    """Median ms of the 32-bit and the 8-bit step by instruction set ("avx512": without VBMI)."""
    from qlora_compile.runtime import kernels
    from qlora_compile.runtime.kernels import cpu

    kernel, find = kernels.find("paged_step", "cpu"), kernels.find
    assert kernel is not None
    times: dict[str, list[list[float]]] = {}
    for turn in range(rounds + 1):
        for isa in cpu.supported_isas():
            kernels.find = lambda op, device, isa=isa: lambda *arguments: kernel(*arguments, isa=isa)
            for place, optimizer in enumerate(made):
                for _ in range(2):
                    begin = time.perf_counter()
                    optimizer.step()
                    ms = (time.perf_counter() - begin) * 1e3
                if turn:
                    times.setdefault(isa, [[], []])[place].append(ms)
    kernels.find = find
    return {isa: [statistics.median(ms) for ms in both] for isa, both in times.items()}


def print_step(found: dict[str, Any]) -> None:
    """The table with its limits."""
    print(f"optimizer step, {found['parameters'] / 1e6:.1f} M parameters, median (least) ms")
    ours, narrow, fused = (found[name] for name in ("ours, 32-bit", "ours, 8-bit", "torch fused"))
    for name, line in found.items():
        if isinstance(line, dict) and "median_ms" in line:
            print(f"  {name:20} {line['median_ms']:8.1f} ({line['min_ms']:.1f})")
    show_limits(
        [
            entry("ours / torch fused", ours["median_ms"] / fused["median_ms"], at_most=1.0),
            entry("8-bit / 32-bit", narrow["median_ms"] / ours["median_ms"], at_most=2.0),
            entry("8-bit / 32-bit, bytes", narrow["state_bytes"] / ours["state_bytes"], at_most=0.3),
        ]
    )
    for isa, (wide_ms, narrow_ms) in found["by_path"].items():
        print(f"  8-bit / 32-bit, {isa:9} {narrow_ms / wide_ms:.2f}  ({narrow_ms:.1f} / {wide_ms:.1f} ms)")


# --- training -------------------------------------------------------------------------------------------------------


def run_workers(names: tuple[str, ...], argv: list[str]) -> dict[str, Any]:
    """Each contender in a process of its own, one after the other."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, *argv, "--worker", name]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found[name] = json.loads(next(line for line in lines if line.startswith("RESULT "))[7:])
    return found


def print_training(found: dict[str, Any]) -> None:
    """Peaks, times, and how far losses are apart."""
    base = found["resident"]
    share = base["state_bytes"] / base["peak_bytes"]
    print(
        f"training: states are {share:.2f} of the peak where they are resident (at least 0.33); {BUDGET} for them paged"
    )
    for name, line in found.items():
        apart = max(abs(a - b) for a, b in zip(line["losses"], base["losses"]))
        peak = f"{line['peak_bytes'] / 1e6:.1f} MB ({line['anonymous_bytes'] / 1e6:.0f} by the whole process)"
        print(f"  {name}: peak {peak}, step {line['seconds']:.3f} s, losses apart {apart:.1e}")
        if line is not base:
            peaks, times = (line[key] / base[key] for key in ("peak_bytes", "seconds"))
            show_limits([entry("peak", peaks, at_most=0.75), entry("step", times, at_most=1.15)])


def print_losses(found: dict[str, Any]) -> None:
    """Equal losses with a quarter of the states on the device, near ones with 8 bits."""
    whole, quarter, narrow = (found[name] for name in LOSSES)
    times = quarter["state_bytes"] / quarter["paging"]["peak_device_bytes"]
    apart = max(abs(a - b) for a, b in zip(whole["losses"], quarter["losses"]))
    print(f"losses: {len(whole['losses'])} steps, held-out loss {whole['held_out']:.4f}")
    ratio = narrow["held_out"] / whole["held_out"]
    show_limits(
        [
            entry(f"losses apart, states {times:.1f} times what of them is on the device", apart, at_most=0.0),
            entry(f"held-out loss {narrow['held_out']:.4f}, 8-bit / 32-bit", ratio, at_most=1.01),
        ]
    )


def print_activations(found: dict[str, Any]) -> None:
    """Peaks and times of both budgets."""
    whole, less = (found[name] for name in BUDGETS)
    peaks = [line["activation_bytes"] for line in (whole, less)]
    print(f"activation_budget 1.0 and 0.3: {peaks[0] / 1e6:.1f} and {peaks[1] / 1e6:.1f} MB kept for the backward pass")
    times = less["seconds"] / whole["seconds"]
    show_limits([entry("activations", peaks[1] / peaks[0], at_most=0.5), entry("step", times, at_most=1.35)])


# By part: its contenders, the layers that its model is cut to, batch, tokens of a sequence, how it is printed
PARTS: dict[str, tuple[tuple[str, ...], int | None, int, int, Callable[[Any], None]]] = {
    "training": (TRAINING, None, 2, 64, print_training),
    "losses": (LOSSES, 2, 1, 96, print_losses),
    "activations": (BUDGETS, 8, 2, 256, print_activations),
}


def run_part(part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one part and print it."""
    if part == "step":
        found = step_alone(arguments.steps)
        print_step(found)
        return found
    names, layers, batch, seq_len, show = PARTS[part]
    narrow = part == "training" and arguments.model is None
    model = llama_shape(**NARROW) if narrow else cut(smollm2(arguments.model), arguments.layers or layers)
    argv = ["--part", part, "--model", model, "--steps", str(arguments.steps)]
    argv += ["--batch", str(arguments.batch or batch), "--seq-len", str(arguments.seq_len or seq_len)]
    found = run_workers(names, argv)
    show(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("step", *PARTS), default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", default=None)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(worker(arguments.worker, arguments)), flush=True)
        return
    chosen = (arguments.part,) if arguments.part else ("step", *PARTS)
    found = {part: run_part(part, arguments) for part in chosen}
    setting = {k: v for k, v in vars(arguments).items() if k in ("layers", "batch", "seq_len", "steps")}
    write_results(arguments.json, setting, found)


if __name__ == "__main__":
    main()
