"""One script for a machine with a GPU: are all kernels right, how fast are they, and the model that is made of them.

    python benchmarks/gpu.py --out DIR [--seconds 440] [--layers N] [--batch 2 --seq-len 2048] [--parts kernels,paging,model]

Needs torch >= 2.11 with CUDA (or ROCm), triton and transformers; peft and bitsandbytes are measured beside us where they
are installed. `jobs` says what is done in which order, each in a process of its own: the device's speeds, and dequantize
beside a copy; every linear kernel beside cuBLAS (dense bf16) for the shapes of Llama-3-8B; training steps and decoding of a
Llama of that shape with as many layers as fit; a paged optimizer, and where its step goes; every kernel against fp64. Most
of it is compilation: the processes of a group compile side by side, and what is timed has the machine to itself. Beside
each number stands what bounds it: bytes at the speed of a read or a copy, operations at cuBLAS's, both measured here, the
host, or launches.

No job starts that cannot get its least time before --seconds are over, so some may be missing: the file says which, and
why. DIR/gpu.json (of an earlier call: replaced) is written after each job, with "summary", and DIR/parts/ by the jobs as
they go, so nothing measured is lost. DIR/table-<kind>.json is the dispatch table to ship as
qlora_compile/runtime/kernels/tables/<kind>.json.

`--small` takes tiny sizes, and `--device cpu` runs the same script without a GPU: that it works is tested so.
Exit code 1: a kernel is wrong, or a job failed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from gpu_run import Job, Run, say

# Before torch is imported: whether there is a GPU is asked of its driver's tools. A process that has asked the GPU itself
# cannot fork others that use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch

THREADS = torch.get_num_threads()
# Imports compute a little. OpenMP's threads do not survive a fork, and a process that waits for them hangs: there are none.
torch.set_num_threads(1)

import gpu_jobs  # noqa: E402
from gpu_summary import summary  # noqa: E402
from limits import line  # noqa: E402

PARTS = ("kernels", "paging", "model")
LLAMA, PEFT, BOTH = ("transformers",), ("transformers", "peft"), ("transformers", "peft", "bitsandbytes")
FIRST, REST, SMALL_REST = (1, 4096), (2048, 16, 64, 4, 512), (16,)  # rows of x; what says most comes first


def jobs(small: bool) -> list[list[Job]]:
    """What is done: groups that get ready side by side, in this order, and of each the least and most seconds of its turn.
    The models of a group fit 80 GB together (results/gpu_h200.json: 16 GB and less each)."""
    linears, contender, paging = gpu_jobs.linears, gpu_jobs.contender, gpu_jobs.paging
    bind = functools.partial
    return [
        [Job("speeds", "", gpu_jobs.speeds, 10, 60), Job("linears", "kernels", bind(linears, FIRST), 15, 90)],
        [
            Job("ours", "model", bind(contender, "ours", True), 10, 60, LLAMA),
            Job("bitsandbytes", "model", bind(contender, "bitsandbytes", True), 10, 60, BOTH),
            Job("dense_lora", "model", bind(contender, "dense_lora", True), 10, 60, PEFT),
            Job("paging_resident", "paging", bind(paging, "resident"), 15, 60, LLAMA),
            Job("paging_paged", "paging", bind(paging, "paged"), 15, 60, LLAMA),
            Job("optimizer_alone", "paging", bind(gpu_jobs.optimizer_alone, None), 5, 40),
            Job("optimizer_32_connections", "paging", bind(gpu_jobs.optimizer_alone, 32), 5, 40),
            Job("check", "kernels", gpu_jobs.check, 5, 150),
        ],
        [
            Job("more_linears", "kernels", bind(linears, SMALL_REST if small else REST), 20, 90),
            Job("ours_without_logits", "model", bind(contender, "ours_without_logits", False), 10, 60, LLAMA),
            Job("bitsandbytes_bf16", "model", bind(contender, "bitsandbytes_bf16", False), 10, 60, BOTH),
        ],
    ]


def start_method(device: str) -> str:
    """ "fork", or where the driver's tools say nothing, so that torch has asked the GPU itself, "spawn": each job imports
    anew, which takes longer."""
    count = torch.cuda._device_count_amdsmi if torch.version.hip else torch.cuda._device_count_nvml
    touched = torch.cuda.is_initialized() or "bitsandbytes" in sys.modules
    return "spawn" if device == "cuda" and (touched or count() < 0) else "fork"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=440, help="no job starts that cannot end before")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes: does the script work?")
    arguments = parser.parse_args()
    parts = tuple(arguments.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no part {min(unknown)!r}, only {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; --device cpu --small runs the script without one.", file=sys.stderr)
        return 2
    if set(parts) & {"paging", "model"} and importlib.util.find_spec("transformers") is not None:
        import transformers.models.llama.modeling_llama  # noqa: F401  # once, for all processes
    torch.set_num_threads(THREADS)  # nothing computes from here on but the jobs
    tokens = (2, 16) if arguments.small else (arguments.batch, arguments.seq_len)
    settings = gpu_jobs.Settings(arguments.device, arguments.small, parts, arguments.layers, tokens)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the job, and writes the file
    return measure(arguments.out, settings, arguments.seconds)


def measure(out: Path, settings: gpu_jobs.Settings, seconds: float) -> int:
    """All jobs of the parts that are wanted. Returns the exit code."""
    run = Run(out, settings, seconds, method=start_method(settings.device), summarize=summary)
    run.own["settings"] = asdict(settings)
    said: set[str] = set()
    groups = jobs(settings.small)
    for number, group in enumerate(groups):
        for job in group:
            if job.part not in ("", *settings.parts):
                run.skip(job.name, "not asked for")
        wanted, *others = ([job for job in one if job.part in ("", *settings.parts)] for one in groups[number:])
        run.do(wanted, later=sum(job.least for other in others for job in other))
        for text in map(line, run.found["summary"]):
            if text not in said:
                said.add(text)
                say(text)
    for entry in run.found["summary"]:
        if entry["met"] is False:
            say("NOT MET", line(entry))
    for text in run.found.get("wrong", []):
        print("WRONG", text, file=sys.stderr, flush=True)
    say(f"{run.found['seconds']:.0f} s in all; {len(run.found['errors'])} jobs failed")
    return run.exit_code()


if __name__ == "__main__":
    sys.exit(main())
