"""Products with a 4-bit weight on a GPU, straight from its codes, as Python functions on tensors.

M rows of x, N rows and K columns of a weight, R ranks. Two kernels: a persistent GEMM for one linear (any M; K divided over
programs where M is small), and dx for a group. Low-rank products, bias and scales are added to the fp32 sum before its one
rounding. For one or two rows of x: triton_vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import triton_build
from .triton_common import FUSED, cdiv, multiprocessors, next_power_of_2
from .triton_launch import TENSOR, Launch, prepared
from .triton_low_rank import NO_DROPOUT, TYPES, Dropout, Scale, lora_up, padded
from .triton_operands import (
    Adapter,
    Weight,
    check_activation,
    check_adapters,
    chunk_of,
    numbers_of,
    rank_arguments,
    spec_of,
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
