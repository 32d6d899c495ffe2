"""Attention on this CPU, forward and backward, causal: every kernel that a model can have, beside torch's own.

    python benchmarks/attention.py [--threads 2] [--repeats 9] [--shapes 2x9x3x256x64,1x32x4x1024x64] [--json FILE]

A shape is batch x query heads x key heads x tokens x size of a head. All contestants take turns in one run; times are
medians, ratios are of them. torch's `scaled_dot_product_attention` ("library") gets key heads that several query heads
share by `enable_gqa`. What bounds them: the operations of the half of the scores that a causal mask leaves, at the speed
of the library's largest product in the same dtype, measured in the same run.
With ATEN_CPU_CAPABILITY=avx2 (and ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2) in the environment, a larger
processor runs what one with AVX2 runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from bounds import best_of, product_speed
from common import Times, alternate, write_results

from qlora_compile.runtime.kernels import devices, dispatch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def contestants(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A call of forward and backward for each candidate that takes the problem."""
    batch, heads, key_heads, tokens, size = shape
    q, k, v, dout = (
        torch.randn(batch, tokens, h, size).to(dtype).transpose(1, 2) for h in (heads, key_heads, key_heads, heads)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    problem = dispatch.Problem("attention", dispatch.bucket(tokens), (tokens,), size, 0, dtype)

    def library() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, inputs, dout)

    def call(candidate: dispatch.Candidate) -> Callable[[], object]:
        def both() -> object:
            assert candidate.run is not None
            return torch.autograd.grad(candidate.run(*inputs, None, True, size**-0.5), inputs, dout)

        return both

    able = [c for c in dispatch.candidates("attention", "cpu") if c.declines(problem) is None and c.name != "library"]
    return {**{c.name: call(c) for c in able}, "library": library}


def operations(shape: tuple[int, ...]) -> float:
    """Two products forward and five backward (scores once more), 2 a multiply-add, over half of tokens x tokens."""
    batch, heads, _, tokens, size = shape
    return 7 * 2 * batch * heads * size * tokens**2 / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--shapes", default="2x9x3x256x64,1x32x4x1024x64,1x16x8x2048x128")
    parser.add_argument("--json", type=Path, help="write the times (seconds) here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speeds = {name: product_speed(best_of(args.repeats), dtype=dtype) for name, dtype in DTYPES.items()}
    found: dict[str, dict[str, object]] = {}
    for text in args.shapes.split(","):
        shape = tuple(map(int, text.split("x")))
        for name, dtype in DTYPES.items():
            times: Times = alternate(contestants(shape, dtype), args.repeats)
            least = operations(shape) / speeds[name]
            speed = f"{1e3 * least:.2f} ms of operations at {speeds[name] / 1e9:.0f} GFLOP/s"
            print(f"{text} {name}, {devices.kind('cpu')}; {speed}")
            for kernel, (median, best) in times.items():
                ratio = median / times["library"][0]
                print(f"  {kernel:<12}{1e3 * median:>10.2f} ms (best {1e3 * best:>9.2f}) {ratio:>6.2f} of torch's")
            facts = {kernel: {"s": median, "best_s": best} for kernel, (median, best) in times.items()}
            found[f"{text} {name}"] = {**facts, "operations_s": least}
    setting = {"repeats": args.repeats, "device": devices.kind("cpu"), "operations_per_s": speeds}
    write_results(args.json, setting, found)


if __name__ == "__main__":
    main()
