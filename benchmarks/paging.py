"""The paged optimizer beside its peers, in one run: the step alone, whole training, and the activation budget.

    python benchmarks/paging.py [--part step|training|activations] [--model DIR] [--layers N] [--json FILE]

step         one optimizer step with all of its state resident, 52 M parameters in LoRA shapes, contenders in turns
training     SmolLM2-135M, r=64 on all linears, 1x128 tokens: anonymous memory of the process (a page file's pages are not
             part of it) at its peak, and the time of a step; AdamW's states resident (torch, fused), paged to a file, and
             stepped in backward; each in a process of its own
activations  the same model with activation_budget 1.0 and 0.3: bytes saved for backward, time of a step

Each line ends with the ratio and the limit that the project set itself. `training` and `activations` run the graphs of
AOTAutograd without Inductor: they compare our own runs with each other, and compile in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import cut, resident_bytes, smollm2, write_results

SHAPES = [
    shape for _ in range(24) for shape in ((64, 4096), (4096, 64), (64, 4096), (11008, 64), (64, 11008), (256, 1024))
]
TRAINING = ("resident", "paged", "in_backward")
BUDGET = "24MiB"


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
    numel = sum(value.numel() for value in values)
    found: dict[str, Any] = {
        name: {"median_ms": statistics.median(ms), "min_ms": min(ms)} for name, ms in times.items()
    }
    for name in ("ours, 32-bit", "ours, 8-bit"):
        found[name]["state_bytes"] = made[name].statistics().device_bytes
    found["parameters"] = numel
    return found


def print_step(found: dict[str, Any]) -> None:
    """The table with its limits."""
    print(f"optimizer step, {found['parameters'] / 1e6:.1f} M parameters, median (least) ms")
    ours, narrow, fused = (found[name] for name in ("ours, 32-bit", "ours, 8-bit", "torch fused"))
    for name, line in found.items():
        if isinstance(line, dict):
            print(f"  {name:20} {line['median_ms']:8.1f} ({line['min_ms']:.1f})")
    print(f"  ours / torch fused        {ours['median_ms'] / fused['median_ms']:.2f}  (limit 1.00)")
    print(f"  8-bit / 32-bit            {narrow['median_ms'] / ours['median_ms']:.2f}  (limit 2.00)")
    print(f"  8-bit / 32-bit, bytes     {narrow['state_bytes'] / ours['state_bytes']:.3f}  (limit 0.30)")


# --- training --------------------------------------------------------------------------------------------------------


class PeakSampler:
    """The most anonymous memory that this process has while it is open, looked at every two milliseconds."""

    def __enter__(self) -> PeakSampler:
        self.peak, self.open = resident_bytes("RssAnon"), True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self) -> None:
        while self.open:
            self.peak = max(self.peak, resident_bytes("RssAnon"))
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self.open = False
        self.thread.join()


def train(arguments: argparse.Namespace, optimizer_of: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    """Some steps on one batch -> median seconds, losses, peak bytes above those of the imports."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlora_compile as qc
    import qlora_compile.backend

    before = resident_bytes("RssAnon")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    config = {"r": 64, "lowering": "aot_eager", "keep_logits": False} | options
    qc.prepare(model, config).train()
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    model.compile(backend="qlora")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.seq_len), generator=generator)
    seconds, losses = [], []

    def step() -> None:
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())

    step()
    step()
    with PeakSampler() as sampler:
        for _ in range(arguments.steps):
            step()
    plan = qc.explain(model).plan
    found = {"seconds": statistics.median(seconds[2:]), "losses": losses, "peak_bytes": sampler.peak - before}
    found["saved_bytes"] = plan.saved_bytes() if plan is not None else None
    if isinstance(optimizer, qc.PagedAdamW):
        found["paging"] = optimizer.statistics().to_dict()
    found["state_bytes"] = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


def worker(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in this process."""
    import torch

    import qlora_compile as qc

    if name.startswith("budget"):
        fused = lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)
        return train(arguments, fused, activation_budget=float(name.removeprefix("budget ")))
    if name == "resident":
        return train(arguments, lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True))
    with tempfile.TemporaryDirectory(dir=Path(__file__).parents[1] / "build") as folder:
        options = {"device_budget": BUDGET, "page_folder": folder, "step_in_backward": name == "in_backward"}
        return train(arguments, lambda p: qc.PagedAdamW(p, lr=1e-4, **options))


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
    print(f"training: states are {share:.2f} of the peak where they are resident")
    for name, line in found.items():
        apart = max(abs(a - b) for a, b in zip(line["losses"], base["losses"]))
        peak = f"{line['peak_bytes'] / 1e6:7.0f} MB ({line['peak_bytes'] / base['peak_bytes']:.2f}, limit 0.75)"
        pace = f"{line['seconds']:.3f} s ({line['seconds'] / base['seconds']:.2f}, limit 1.15)"
        print(f"  {name:12} peak {peak}  step {pace}  losses apart {apart:.1e}")


def print_activations(found: dict[str, Any]) -> None:
    """Peaks and times of both budgets."""
    whole, less = found["budget 1.0"], found["budget 0.3"]
    print(f"activation_budget 0.3 / 1.0: step {less['seconds'] / whole['seconds']:.2f} (limit 1.35)")
    print(f"  peak of the process {less['peak_bytes'] / whole['peak_bytes']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("step", "training", "activations"), default="step")
    parser.add_argument("--model", default=None)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--worker", default=None)
    arguments = parser.parse_args()
    if arguments.part != "step":
        arguments.model = cut(smollm2(arguments.model), arguments.layers)
        arguments.batch = arguments.batch or (1 if arguments.part == "training" else 2)
        arguments.seq_len = arguments.seq_len or (128 if arguments.part == "training" else 256)
    if arguments.worker:
        print("RESULT " + json.dumps(worker(arguments.worker, arguments)), flush=True)
        return
    if arguments.part == "step":
        found = step_alone(arguments.steps)
        print_step(found)
    else:
        argv = ["--part", arguments.part, "--model", arguments.model, "--steps", str(arguments.steps)]
        argv += ["--batch", str(arguments.batch), "--seq-len", str(arguments.seq_len)]
        names = TRAINING if arguments.part == "training" else ("budget 1.0", "budget 0.3")
        found = run_workers(names, argv)
        (print_training if arguments.part == "training" else print_activations)(found)
    setting = {k: v for k, v in vars(arguments).items() if k in ("part", "layers", "batch", "seq_len", "steps")}
    write_results(arguments.json, setting, found)


if __name__ == "__main__":
    main()
