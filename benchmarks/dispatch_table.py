"""Times every kernel that may run an op here, and writes the dispatch table that ships for this kind of device.

    python benchmarks/dispatch_table.py [--out runtime/kernels/tables/KIND.json]

Each problem takes at most a second. Sizes are those of SmolLM2-135M's and Llama-shaped layers; `dispatch.choose` takes the
nearest entry, by rows first, for a problem that this machine has not measured itself. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import machine

from qlora_compile.runtime.kernels import autotune, dispatch, tuning

GROUPS = [
    ((576, 192, 192), 576, 48),
    ((1536, 1536), 576, 32),
    ((576,), 1536, 16),
    ((2048,), 2048, 16),
    ((4096,), 4096, 16),
]
ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
# Queries (as many keys), size of a head. Fewer queries are left to the next: what repeated key heads and masks cost the
# others is not in these times, and some microseconds a layer is all there is between them.
ATTENTIONS = [(64, 64), (256, 64), (1024, 64), (1024, 128)]
DENSE = [(16, 2048, 2048), (512, 2048, 2048), (512, 8192, 576)]  # rows, N, K


def problems(device: str) -> Iterator[dispatch.Problem]:
    for n, k, rank in GROUPS:
        for rows in ROWS:
            yield dispatch.Problem("lora_linear", rows, n, k, rank, torch.bfloat16, "nf4", 64, device)
        for rows in (16, 512):
            yield dispatch.Problem("lora_linear_backward", rows, n, k, rank, torch.bfloat16, "nf4", 64, device)
    for rows, size in ATTENTIONS:
        yield dispatch.Problem("attention", rows, (rows,), size, 0, torch.bfloat16, device=device)
    for rows, n, k in DENSE:
        yield dispatch.Problem("dense_linear", rows, (n,), k, 0, torch.bfloat16, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file to write (default: the table of this kind of device)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    facts = tuning.about(arguments.device)
    out = arguments.out or dispatch.TABLES / f"{facts['kind']}.json"
    entries, begin = [], time.perf_counter()
    for problem in problems(arguments.device):
        times = autotune.time_candidates(problem)
        if len(times) > 1:
            entries.append(dispatch.entry_of(problem, times))
            print(f"{problem.op:22} {entries[-1].text(list(times))}", flush=True)
    body = {"about": machine() | facts, "entries": [entry._asdict() for entry in entries]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(entries)} problems in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
