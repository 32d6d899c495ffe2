"""One script for a machine with a GPU: are all kernels right, how fast are they, and the model that is made of them.

    python benchmarks/gpu.py --out DIR [--seconds 480] [--layers N] [--batch 2 --seq-len 2048] [--parts kernels,paging,model]

Needs torch >= 2.11 with CUDA (or ROCm), triton and transformers; peft and bitsandbytes are measured beside us where they
are installed. In this order, until the time is up: every kernel against fp64; dequantize beside a copy; every linear
kernel beside cuBLAS (dense bf16) for the shapes of Llama-3-8B, with what bounds it (bytes at the speed of a copy,
operations at cuBLAS's, both measured here, or neither: launches and latency); a paged optimizer; training steps and
decoding of a Llama of that shape with as many layers as fit. DIR/gpu.json is written after each part, so that nothing
measured is lost, and
DIR/table-<kind>.json is the dispatch table to ship as qlora_compile/runtime/kernels/tables/<kind>.json.

`--small` takes tiny sizes, and `--device cpu` runs the same script without a GPU: that it works is tested so.
Exit code 1: a kernel is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_models
import gpu_paging
import torch
from bounds import explained
from common import machine

from qlora_compile.runtime.kernels import devices, dispatch, tuning

GROUPS = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))
PARTS = ("kernels", "paging", "model")
ROWS = (1, 4096, 16, 64, 2048, 4, 512)  # what says most comes first: time may run out


class Run:
    """What was found so far, the clock, and the file that is written after each part."""

    def __init__(self, out: Path, device: str, seconds: float) -> None:
        self.out, self.device, self.end = out, device, time.monotonic() + seconds
        self.found: dict[str, Any] = {"machine": machine() | tuning.about(device)}
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def keep(self, part: str, value: Any) -> None:
        self.found[part] = value
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def kernel_parts(run: Run, small: bool) -> list[str]:
    """Checks and times of single kernels. Returns what is wrong."""
    print("kernels against fp64", flush=True)
    wrong = gpu_kernels.check(run.device, print)
    run.keep("wrong", wrong)
    shapes = ((96, 160), (33, 96)) if small else ((4096, 4096), (14336, 4096), (4096, 14336))
    speeds = gpu_kernels.speeds(run.device, small)
    run.keep("speeds", asdict(speeds))
    print(f"copy {speeds.copy / 1e9:,.0f} GB/s, bf16 products {speeds.operations / 1e12:,.1f} TFLOP/s", flush=True)
    rows = [gpu_kernels.dequantize_row(run.device, n, k, speeds) for n, k in shapes]
    run.keep("dequantize", rows)
    for r in rows:
        copy = f"{r['of_copy_bandwidth']:.2f} of a copy of the same bytes"
        print(f"dequantize {r['n']}x{r['k']}: {r['ours_us']:,.1f} us, {copy}; {explained(r['bound'])}")
    groups = (((64, 32), 96),) if small else GROUPS
    begin = run.left()
    rows = gpu_kernels.linear_rows(
        run.device, ROWS[:4] if small else ROWS, groups, lambda: run.left() < begin * 0.6 and not small, speeds
    )
    run.keep("linear", rows)
    for r in rows:
        times = ", ".join(f"{name} {us:,.0f}" for name, us in r["us"].items())
        print(f"{r['op']} M={r['m']} N={r['n']} K={r['k']}: dense bf16 {r['dense_bf16_us']:,.0f} us; {times}")
        print(f"    {r['best']}: {explained(r['bound'])}")
    print("\n".join(gpu_kernels.shares_of_the_library(rows)))
    entries = gpu_kernels.table_entries(rows, run.device)
    path = run.out / f"table-{devices.kind(run.device)}.json"
    body = {"about": tuning.about(run.device), "entries": [entry._asdict() for entry in entries]}
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    if not small:
        tuning.remember(entries, run.device)  # the models run by what was measured
        dispatch.forget_choices()
    return wrong


def model_parts(run: Run, arguments: argparse.Namespace) -> None:
    """Training and decoding, each contender after the other, as long as there is time."""
    shape = gpu_models.SMALL if arguments.small else gpu_models.LLAMA_3_8B
    layers = arguments.layers or (2 if arguments.small else layers_that_fit(run.device))
    tokens = (2, 16) if arguments.small else (arguments.batch, arguments.seq_len)
    found: dict[str, Any] = {"layers": layers, "tokens": tokens, "skipped": {}}
    for part in ("training", "decoding"):
        found[part] = {}
        for name in gpu_models.CONTENDERS:
            if part == "decoding" and name == "ours_without_logits":
                continue  # it is about the loss
            package = gpu_models.missing(name)
            if package is not None or run.left() < 30:
                found["skipped"][f"{part} {name}"] = f"{package} is not installed" if package else "no time left"
                continue
            if part == "training":
                result = gpu_models.training(name, shape, layers, tokens, run.device, 2 if arguments.small else 8)
            else:
                result = gpu_models.decoding(name, shape, layers, run.device, 4 if arguments.small else 64)
            found[part][name] = result
            run.keep("model", found)
            numbers = [f"{key} {value:.4g}" for key, value in result.items() if key != "profile"]
            if "profile" in result:
                numbers.append(f"device works {result['profile']['device_ms']:.4g} ms")
            print(f"{part} {name}: {', '.join(numbers)}", flush=True)
    for reason, why in found["skipped"].items():
        print(f"not measured: {reason}: {why}")
    run.keep("model", found)


def paging_part(run: Run, small: bool) -> None:
    """AdamW's states resident and paged, where there is time for both compilations."""
    if run.left() < 90 and not small:
        print("not measured: paging: no time left")
        return
    shape, layers = (gpu_models.SMALL, 2) if small else (gpu_paging.NARROW, gpu_paging.LAYERS)
    batches, steps = (2, 2) if small else (gpu_paging.MICRO_BATCHES, 5)
    found = {name: gpu_paging.run(name, shape, layers, batches, run.device, steps) for name in gpu_paging.CONTENDERS}
    run.keep("paging", found)
    print("\n".join(gpu_paging.lines(found)), flush=True)


def layers_that_fit(device: str) -> int:
    """Llama-3-8B has 32; a dense bf16 layer takes 0.44 GB, embedding, head and activations about 12."""
    if device != "cuda":
        return 1
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(8, int((free - 12e9) / 1.5e9)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="stop starting parts after this")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes: does the script work?")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu --small runs the script without one.", file=sys.stderr)
        return 2
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no part {min(unknown)!r}, only {', '.join(PARTS)}")
    run = Run(arguments.out, arguments.device, arguments.seconds)
    wrong = kernel_parts(run, arguments.small) if "kernels" in parts else []
    if "paging" in parts:
        paging_part(run, arguments.small)
    if "model" in parts:
        model_parts(run, arguments)
    for line in wrong:
        print("WRONG", line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
