"""NF4 kernels on this CPU: our generated C++ against bitsandbytes, a plain copy of as many bytes, and dense linears.

    python benchmarks/codec.py [--threads 2] [--repeats 15] [--shapes 4096x4096,11008x4096] [--json FILE]

All contestants take turns in one run, so that a busy machine slows them alike; times are medians, ratios are of them.
Dequantize writes bf16 into a reused buffer on both sides, which for bitsandbytes means calling its library's function
directly (its public call always allocates); and bitsandbytes gets its scales already decoded, ours decodes them.
Each table ends with what bounds it on this machine, measured in the same run: its bytes (read and written once) at the
speed of a copy or of a read, its operations at the speed of the library's largest bf16 product; and how near we are.
Below it are the ratios with a limit, which are meant for two cores with AVX-512 BF16.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
from dataclasses import asdict
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.cextension import lib
from bitsandbytes.nn import Linear4bit, Params4bit
from bounds import Speeds, Work, best_of
from common import Times, alternate, hold_peer, write_results
from limits import Found, entry, show_limits

from qlora_compile import nf4
from qlora_compile.runtime.kernels import cpu_gemm, devices, find, lora_kernels


def bench_dequantize(rows: int, columns: int, repeats: int) -> Times:
    """Times in seconds."""
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    data = nf4.quantize_reference(weight, "nf4", 64, True)
    scales = nf4.dequantize_scales(*data[1:])
    codes, out = data.codes.view(-1, 1), torch.empty_like(weight)
    kernel = find("dequantize_4bit", "cpu")
    if kernel is None:
        raise SystemExit("There is no kernel to measure: install a C++ compiler.")
    moved = sum(t.nbytes for t in data if t is not None) + out.nbytes  # read + written
    source = torch.zeros(moved // 2, dtype=torch.uint8)  # a copy reads and writes: half of the bytes each
    target = torch.empty_like(source)
    sizes = [ctypes.c_longlong(n) for n in (64, rows, columns)]
    theirs = torch.empty_like(weight)
    pointers = [bnb.get_ptr(t) for t in (codes, scales, theirs)]
    op = torch.ops.bitsandbytes.dequantize_4bit.default
    return alternate(
        {
            "ours": lambda: kernel(*data, weight.numel(), "nf4", 64, out),
            "bitsandbytes": lambda: lib.cdequantize_blockwise_cpu_nf4_bf16(*pointers, *sizes),
            "bitsandbytes, public": lambda: op(codes, scales, 64, "nf4", weight.shape, torch.bfloat16),
            "copy of the same bytes": lambda: target.copy_(source),
        },
        repeats,
    )


def bench_quantize(rows: int, columns: int, repeats: int) -> Times:
    """Times in seconds, double quantization included on both sides."""
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    kernel = find("quantize_4bit", "cpu")
    if kernel is None:
        raise SystemExit("There is no kernel to measure: install a C++ compiler.")
    return alternate(
        {
            "ours": lambda: kernel(weight, "nf4", 64, True),
            "bitsandbytes": lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True),
        },
        repeats,
    )


def bench_linear(rows: int, columns: int, tokens: int, repeats: int) -> Times:
    """Times in seconds of a product with `tokens` rows: from the codes for few, else by dequantizing first.

    Where the CPU multiplies no bf16, ours has fp32 products, of many rows by the generated GEMM, which decodes where it
    lays out; a dense fp32 linear is the one to compare with.
    """
    bf16 = devices.multiplies_natively(torch.bfloat16)
    kernel = find("linear_4bit_small" if bf16 else "wide_linear_4bit_small", "cpu")
    dequantize = find("dequantize_4bit", "cpu")
    if kernel is None or dequantize is None:
        raise SystemExit("There is no kernel to measure: install a C++ compiler.")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    data = nf4.quantize_reference(weight, "nf4", 64, True)
    out = torch.empty(tokens, rows, dtype=torch.bfloat16)
    ours = torch.empty(rows, columns, dtype=torch.bfloat16 if bf16 else torch.float32)
    wide, x_wide = weight.float(), x.float()
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").eval()

    def by_dequantizing() -> torch.Tensor:
        dequantize(*data, weight.numel(), "nf4", 64, ours)
        return torch.nn.functional.linear(x.to(ours.dtype), ours).to(x.dtype)

    gemm = find("wide_gemm", "cpu")
    stored = cpu_gemm.Codes(*data[:4], rows, columns, "nf4", 64, transposed=True)

    def by_gemm() -> torch.Tensor:
        assert gemm is not None
        gemm([cpu_gemm.Term(x, stored)], out)
        return out

    from_codes = functools.partial(kernel, x, *data, rows, columns, "nf4", 64, out)
    many = by_dequantizing if gemm is None else by_gemm
    few = lora_kernels.SMALL_M if bf16 else lora_kernels.SMALL_WIDE_M
    linear = torch.nn.functional.linear
    dense_linears = (
        {"bf16 linear": lambda: linear(x, weight)} if bf16 else {"fp32 linear": lambda: linear(x_wide, wide)}
    )
    with torch.no_grad():
        return alternate(
            {
                "ours": from_codes if tokens <= few else many,
                "bitsandbytes": lambda: layer(x),
                **dense_linears,
            },
            repeats,
        )


def work_of(title: str) -> Work:
    """Bytes and operations of a title made in `main`: "dequantize NxK", "quantize NxK", "linear NxK, M rows of x"."""
    op, shape, *rest = title.replace(",", "").split()
    rows, columns = map(int, shape.split("x"))
    packed = Work.of_linears(0, rows, columns).read
    if op == "dequantize":
        return Work(packed, 2 * rows * columns)
    return Work(2 * rows * columns, packed) if op == "quantize" else Work.of_linears(int(rest[0]), rows, columns)


def limits(title: str, times: Times) -> list[Found]:
    """What is wanted of a table made of large matrices (one that fits a cache has no limit): the others' time over ours."""
    op, shape, *rest = title.replace(",", "").split()
    if int(shape.split("x")[0]) < 4096:
        return []
    theirs = {name: median / times["ours"][0] for name, (median, _) in times.items()}
    dense = next((name for name in theirs if name.endswith("linear")), "")
    wanted: dict[str, float]
    if op == "dequantize":
        wanted = {"bitsandbytes": 2.0, "copy of the same bytes": 0.85}
    elif op == "quantize":
        wanted = {"bitsandbytes": 10.0}
    elif rest[0] == "1":
        wanted = {dense: 3.0, "bitsandbytes": 1.2}
    else:
        wanted = {dense: 1.8 if int(rest[0]) <= 16 else 1 / 1.1}
    return [entry(f"{name} / ours", theirs[name], at_least=least) for name, least in wanted.items()]


def show(title: str, times: Times, speeds: Speeds) -> None:
    print(f"{title} (nf4, block 64, double quantization, bf16)")
    ours = times["ours"]
    for name, (median, best) in times.items():
        ratios = f"{median / ours[0]:>7.2f}x ours, best {best / ours[1]:.2f}x"
        print(f"  {name:<24}{median * 1e6:>9.0f} us (best {best * 1e6:>9.0f}) {ratios}")
    seconds, what = speeds.bound(work_of(title))
    print(f"  bound by {what}: {seconds * 1e6:.0f} us, {seconds / ours[0]:.2f} of ours, best {seconds / ours[1]:.2f}")
    show_limits(limits(title, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,1536x576")
    parser.add_argument("--json", type=Path, help="write the times (seconds) here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hold_peer()
    results: dict[str, Times] = {}
    for shape in args.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        results[f"dequantize {shape}"] = bench_dequantize(rows, columns, args.repeats)
        results[f"quantize {shape}"] = bench_quantize(rows, columns, max(3, args.repeats // 3))
        for tokens in (1, 8, 16, 512):
            results[f"linear {shape}, {tokens} rows of x"] = bench_linear(rows, columns, tokens, args.repeats)
    speeds = Speeds.measure(best_of(args.repeats))
    for title, times in results.items():
        show(title, times, speeds)
    found = {
        title: {name: {"s": s, "best_s": best} for name, (s, best) in times.items()} for title, times in results.items()
    }
    for title, times in results.items():
        found[title]["bound"] = speeds.explain(work_of(title), times["ours"][0])
    setting = {"repeats": args.repeats, "block_size": 64, "dtype": "bfloat16", "speeds": asdict(speeds)}
    write_results(args.json, setting, found)


if __name__ == "__main__":
    main()
