"""Products with a 4-bit weight on a GPU, straight from its codes, as Python functions on tensors.

M rows of x, N rows and K columns of a weight, R ranks. Three kernels: a matrix-vector product for a whole group of
linears (M <= 2), a persistent GEMM for one linear (any M; K divided over programs where M is small), and dx for a group.
Low-rank products, bias and scales are added to the fp32 sum before its one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from . import triton_build
from .checks import check
from .triton_common import DTYPES, FUSED, cdiv, multiprocessors, next_power_of_2
from .triton_launch import TENSOR, Launch, prepared
from .triton_low_rank import NO_DROPOUT, TYPES, Dropout, Scale, lora_up, padded
from .triton_operands import (
    Adapter,
    VectorAdapter,
    Weight,
    check_activation,
    check_adapters,
    check_factor,
    chunk_of,
    numbers_of,
    rank_arguments,
    spec_of,
)

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


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a GEMM."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def forward_tiles(m: int, dtype: torch.dtype) -> Tiles:
    """Reckoned from shared memory and registers, not measured: 16 ... 64 columns of y^T for few rows, else 128 x 128."""
    if dtype == torch.float32:
        return Tiles(min(max(next_power_of_2(m), 16), 64), 64, 32, 4, 2)
    if m <= 64:
        return Tiles(max(next_power_of_2(m), 16), 64, 128, 4, 3)
    return Tiles(128, 128, 64, 8, 3)


def lora_linear_gemm(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    adapters: Sequence[Adapter] = (),
    bias: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """out [M, N] = x [M, K] W^T + bias + sum_j alpha_j scaling_j h_j B_j^T for any M, straight from the codes."""
    what = "lora_linear_gemm", *numbers_of(weight), *[a.alpha for a in adapters], bias is not None, tiles
    scaling = [a.scaling for a in adapters if a.scaling is not None]
    codes, low, factors = weight.arguments(), [a.low for a in adapters], [a.factor for a in adapters]
    extra = [] if bias is None else [bias]
    given = [x, *codes, out, *extra, *low, *factors, *scaling]
    launch = prepared(what, given, lambda: _gemm_launch(x, weight, out, adapters, bias, tiles))
    if not x.shape[0]:
        return
    if launch.splits == 1:
        mine = [t for adapter in zip(low, factors, *([scaling] if scaling else [])) for t in adapter]
        launch([x, *codes, out, *extra, *mine])
        return
    target = torch.empty(launch.splits, *out.shape, dtype=torch.float32, device=x.device)
    launch([x, *codes, target])
    lora_up(out, low, factors, Scale([a.alpha for a in adapters], scaling), bias=bias, partial=target)


def _gemm_launch(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    adapters: Sequence[Adapter],
    bias: Tensor | None,
    tiles: Tiles | None,
) -> Launch:
    m, k = x.shape
    weight.check(x.device)
    check_activation("x", x, weight.columns, x.dtype, x.device)
    check_activation("out", out, weight.rows, out.dtype, x.device)
    check_adapters(adapters, weight.rows, 0, x)
    tiles = tiles or forward_tiles(m, x.dtype)
    chunk = chunk_of(k, weight.block_size, tiles.block_k)
    count = cdiv(m, tiles.block_m) * cdiv(weight.rows, tiles.block_n)
    cores = multiprocessors(x.device)
    steps = cdiv(k, tiles.block_k)
    splits = max(1, min(2 * cores // max(count, 1), steps // 4, 16)) if m <= 64 else 1
    programs = 2 * cores if m <= 64 else cores  # decoding waits for memory: the registers hold a second one's tile
    here = adapters if splits == 1 else ()
    biased = bias is not None and splits == 1
    spec = spec_of(weight, here, adapters=len(here), bias=biased, splits=splits > 1, dropout=False)
    arguments: list[Any] = [TENSOR, x.stride(0), *[TENSOR] * len(weight.arguments())]
    arguments += [TENSOR, out.stride(0) if splits == 1 else weight.rows, *[TENSOR] * biased, m, weight.rows, k, k // 2]
    for adapter in here:
        rank = adapter.factor.shape[1]
        arguments += [TENSOR, adapter.low.stride(0), *rank_arguments(adapter), rank, padded(rank)]
    return Launch(
        triton_build.load("lora_linear_gemm", **spec).lora_linear_gemm,
        (min(count, programs) if splits == 1 else count, splits),
        arguments,
        splits,
        BLOCK_SIZE=weight.block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        CHUNK=chunk,
        CHUNKS=tiles.block_k // chunk,
        GROUP_M=8,
        SPLITS=splits,
        STAGES=tiles.stages,
        TYPE=TYPES[x.dtype],
        num_warps=tiles.warps,
        **FUSED,
    )


def lora_linear_dx(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Weight],
    adapters: Sequence[Adapter] = (),
    dropout: Dropout = NO_DROPOUT,
    tiles: Tiles | None = None,
) -> None:
    """dx [M, K] = sum_i dy_i W_i + sum_j mask_j(g_j A_j), straight from the codes; adapters hold g_j and A_j."""
    tensors = [dx]
    for dy, weight in zip(dys, weights, strict=True):
        tensors += [dy, *weight.arguments()]
    for j, adapter in enumerate(adapters):
        tensors += [adapter.low, adapter.factor, *dropout.seed[j : j + 1]]
    what = "lora_linear_dx", *[number for weight in weights for number in numbers_of(weight)], dropout.keep, tiles
    launch = prepared(what, tensors, lambda: _dx_launch(dx, dys, weights, adapters, dropout, tiles))
    if dx.shape[0]:
        launch(tensors)


def _dx_launch(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Weight],
    adapters: Sequence[Adapter],
    dropout: Dropout,
    tiles: Tiles | None,
) -> Launch:
    m, k = dx.shape
    dtype = dys[0].dtype
    for dy, weight in zip(dys, weights):
        weight.check(dx.device)
        check_activation("dy", dy, weight.rows, dtype, dx.device)
    check_activation("dx", dx, weights[0].columns, dx.dtype, dx.device)
    check_adapters(adapters, 0, k, dys[0])
    first = weights[0]
    tiles = tiles or dx_tiles(m, dtype)
    chunk = chunk_of(k, first.block_size, tiles.block_k)
    spec = spec_of(first, (), adapters=len(adapters), linears=len(weights), dropout=bool(dropout.seed))
    arguments: list[Any] = [TENSOR, dx.stride(0), m, k, k // 2, *([dropout.keep] if dropout.seed else [])]
    for dy, weight in zip(dys, weights):
        arguments += [TENSOR, dy.stride(0), *[TENSOR] * len(weight.arguments()), weight.rows]
    for adapter in adapters:
        rank = adapter.factor.shape[0]
        seed = [TENSOR] * bool(dropout.seed)
        arguments += [TENSOR, adapter.low.stride(0), TENSOR, *seed, rank, padded(rank)]
    return Launch(
        triton_build.load("lora_linear_dx", **spec).lora_linear_dx,
        (cdiv(m, tiles.block_m), cdiv(k, tiles.block_k)),
        arguments,
        BLOCK_SIZE=first.block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        CHUNK=chunk,
        CHUNKS=tiles.block_k // chunk,
        STAGES=tiles.stages,
        TYPE=TYPES[dtype],
        num_warps=tiles.warps,
        **FUSED,
    )


def dx_tiles(m: int, dtype: torch.dtype) -> Tiles:
    """The same for dx, where block_k counts columns of dx and block_n the terms of a step."""
    if dtype == torch.float32:
        return Tiles(min(max(next_power_of_2(m), 16), 64), 32, 64, 4, 2)
    if m <= 64:
        return Tiles(max(next_power_of_2(m), 16), 64, 64, 4, 3)
    return Tiles(128, 64, 128, 8, 3)
