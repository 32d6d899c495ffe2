"""One or two rows of x times the 4-bit weights of a whole group of linears, on a GPU: two launches.

M rows of x, N rows and K columns of a weight, R ranks. The first launch spreads x to the order in which codes lie, in fp32,
and multiplies parts of K by all A_j; the second reads the codes, adds the parts up, and rounds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from . import triton_build
from .checks import check
from .triton_common import DTYPES, FUSED, cdiv, multiprocessors, next_power_of_2
from .triton_launch import TENSOR, Launch, prepared
from .triton_low_rank import TYPES
from .triton_operands import VectorAdapter, Weight, check_activation, check_factor, numbers_of, rank_arguments, spec_of

MOST_VECTOR_ROWS = 2  # of four, sums take the registers: an H200 was faster by the GEMM
PROGRAMS = 32  # of one warp, that a multiprocessor runs at once


def lora_linear_vector(
    x: Tensor,
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    h: Tensor,
    adapters: Sequence[Sequence[VectorAdapter]] = (),
    bias: Sequence[Tensor] = (),
) -> None:
    """outs[i] [M, N_i] = x [M, K] W_i^T + bias_i + sum_j alpha_j scaling_j h_j B_j^T with h_j = x A_j^T: two launches for
    the whole group.

    M <= MOST_VECTOR_ROWS; h [M, sum R] is written, the h_j side by side, in the adapters' order.
    """
    m, k = x.shape
    what = "lora_linear_vector", *[numbers_of(w) for w in weights], *[tuple(a.alpha for a in mine) for mine in adapters]
    flat = [adapter for mine in adapters for adapter in mine]
    before = [x, h, *[a.down for a in flat]]
    start = prepared(("lora_linear_vector_start", *what[1:]), before, lambda: _vector_start(x, weights, h, flat))
    rows, ranks = next_power_of_2(max(m, 1)), h.shape[1]
    spread = scratch(x, rows * (k + start.splits * ranks))
    tensors = [spread, *([h] if flat else []), *_vector_tensors(weights, outs, adapters, bias)]
    form = [x, *tensors[1:]]  # what is known of `spread` follows
    launch = prepared(what, form, lambda: _vector_launch(x, weights, outs, h, adapters, bias, start.splits))
    if m:
        start([x, spread, *before[2:]])
        launch(tensors)


def scratch(like: Tensor, numel: int) -> Tensor:
    """fp32 numbers between two launches."""
    return torch.empty(numel, dtype=torch.float32, device=like.device)


def _vector_tensors(
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    adapters: Sequence[Sequence[VectorAdapter]],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    """What a `_vector_launch` is called with besides x and h."""
    out = []
    for i, (weight, y) in enumerate(zip(weights, outs, strict=True)):
        out += [*weight.arguments(), *bias[i : i + 1], y]
        for adapter in adapters[i] if adapters else ():
            out += [adapter.up, *([] if adapter.scaling is None else [adapter.scaling])]
    return out


def _vector_start(x: Tensor, weights: Sequence[Weight], h: Tensor, adapters: Sequence[VectorAdapter]) -> Launch:
    """The launch that spreads x and multiplies it by all A_j; `splits`: over how many programs K is divided."""
    m, k = x.shape
    if m > MOST_VECTOR_ROWS:
        raise KernelError(f"lora_linear_vector takes at most {MOST_VECTOR_ROWS} rows of x, got {m}.")
    check_activation("x", x, weights[0].columns, x.dtype, x.device)
    check_activation("h", h, sum(adapter.down.shape[0] for adapter in adapters), x.dtype, x.device)
    # the next kernel's programs add the parts up: 32 of 16 ranks; and so much of A is in the registers
    ranks = max([next_power_of_2(adapter.down.shape[0]) for adapter in adapters], default=1)
    chunk = min(max(128, next_power_of_2(cdiv(k, min(32, max(4, 512 // ranks))))), (1 << 15) // min(ranks, 64))
    chunks = cdiv(k, chunk)
    arguments: list[Any] = [TENSOR, x.stride(0), TENSOR, m, k]
    for adapter in adapters:
        rank = adapter.down.shape[0]
        check_factor("A", adapter.down, (rank, k), x.device)
        arguments += [TENSOR, *adapter.down.stride(), rank, next_power_of_2(rank)]
    spec = _vector_spec(weights, m, (len(adapters),), x)
    return Launch(
        triton_build.load("lora_linear_small", **spec).lora_linear_small_start,
        (chunks, max(len(adapters), 1)),
        arguments,
        chunks,
        CHUNK=chunk,
        TYPE=TYPES[x.dtype],
        num_warps=4,
        **FUSED,
    )


def _vector_spec(weights: Sequence[Weight], m: int, counts: Sequence[int], like: Tensor, **more: Any) -> dict[str, Any]:
    spec = {
        "rows": next_power_of_2(max(m, 1)),
        "unroll": vector_rows(weights, m, like.device),
        "adapters": tuple(counts),
    }
    return spec_of(weights[0], ()) | spec | {"bias": False} | more


def vector_rows(weights: Sequence[Weight], m: int, device: torch.device) -> int:
    """How many rows of the weights a program takes, 2 or 4: x is read once for all of them. Four where enough programs are
    left to fill the device, and their sums leave registers (an H200: 38.7 us for 41.4 of N=28672, but 14.3 for 12.6 of
    4096).
    """
    return 4 if m == 1 and sum(w.rows for w in weights) >= 4 * PROGRAMS * multiprocessors(device) else 2


def _vector_launch(
    x: Tensor,
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    h: Tensor,
    adapters: Sequence[Sequence[VectorAdapter]],
    bias: Sequence[Tensor],
    chunks: int,
) -> Launch:
    """The launch of `lora_linear_vector` for tensors of this form."""
    m, k = x.shape
    first = weights[0]
    adapters = adapters or [()] * len(weights)
    flat = [adapter for mine in adapters for adapter in mine]
    for i, (weight, out, mine) in enumerate(zip(weights, outs, adapters, strict=True)):
        weight.check(x.device)
        check_activation("out", out, weight.rows, out.dtype, x.device)
        for b in bias[i : i + 1]:
            check("bias", b, DTYPES, weight.rows, x.device)
        for adapter in mine:
            check_factor("B", adapter.up, (weight.rows, adapter.down.shape[0]), x.device)
            check("B", adapter.up, DTYPES, 0, x.device)
    scaling = bool(flat) and flat[0].scaling is not None
    counts = [len(mine) for mine in adapters]
    spec = _vector_spec(weights, m, counts, x, bias=bool(bias), scaling=scaling)
    arguments: list[Any] = [TENSOR, *([TENSOR, h.stride(0)] if flat else []), m, k, k // 2]
    for weight, out, mine in zip(weights, outs, adapters):
        arguments += [TENSOR] * (len(weight.arguments()) + len(bias[:1]) + 1) + [out.stride(0), weight.rows]
        for adapter in mine:
            rank = adapter.up.shape[1]
            arguments += [*rank_arguments(adapter), rank, next_power_of_2(rank)]
    words = min(max(next_power_of_2(k // 8), 4), 128)  # 32 threads with four each
    block_n = 128 // words  # shorter rows side by side
    return Launch(
        triton_build.load("lora_linear_small", **spec).lora_linear_small,
        (sum(cdiv(weight.rows, block_n * spec["unroll"]) for weight in weights),),
        arguments,
        BLOCK_SIZE=first.block_size,
        BLOCK_N=block_n,
        WORDS=words,
        EVEN=k % (8 * words) == 0,
        CHUNKS=chunks,
        PADDED=next_power_of_2(chunks),
        TYPE=TYPES[x.dtype],
        num_warps=1,  # looks codes up by shuffles within the warp; more meet at barriers and were 1.2 times slower
        **FUSED,
    )
