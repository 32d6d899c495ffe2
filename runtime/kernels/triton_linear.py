"""Products with a 4-bit weight on a GPU, straight from its codes, as Python functions on tensors.

M rows of x, N rows and K columns of a weight, R ranks. Three kernels: a matrix-vector product for a whole group of
linears (M <= 4), a persistent GEMM for one linear (any M; K divided over programs where M is small), and dx for a group.
Low-rank products, bias and scales are added to the fp32 sum before its one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import QuantizedData, check_format
from . import triton_build
from .checks import check, check_scales
from .triton_common import DTYPES, cdiv, multiprocessors, next_power_of_2, on_device, scale_arguments
from .triton_low_rank import NO_DROPOUT, TYPES, Dropout, Scale, lora_up, padded

MOST_VECTOR_ROWS = 4
SMALLEST_CHUNK = 32  # columns: 16 bytes of codes, one access
_LAUNCH = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Weight:
    """One 4-bit weight [N, K] as the kernels read it."""

    data: QuantizedData
    rows: int
    columns: int
    quant_type: str
    block_size: int

    def arguments(self) -> list[Tensor]:
        return [self.data.codes, *scale_arguments(*self.data[1:])]

    def check(self, device: torch.device) -> None:
        """Raises KernelError unless the tensors hold this weight and lie on the device."""
        check_format(self.quant_type, self.block_size)
        numel = self.rows * self.columns
        check("codes", self.data.codes, (torch.uint8,), numel // 2, device)
        check_scales(*self.data[1:], -(-numel // self.block_size), device)
        reason = declined(self.columns, self.block_size)
        if reason is not None:
            raise KernelError(reason)


@dataclass(frozen=True)
class Adapter:
    """One adapter of a linear: h [M, R] (or g), its factor (B [N, R], or A [R, K] for dx), alpha and scaling."""

    low: Tensor
    factor: Tensor
    alpha: float = 1.0
    scaling: Tensor | None = None


def chunk_of(columns: int, block_size: int, most: int) -> int:
    """Columns read under one scale: the largest power of two, at most `most`, that divides the block size and K."""
    return min(columns & -columns, block_size, most) if columns else most


def declined(columns: int, block_size: int) -> str | None:
    """Why a weight with so many columns cannot be read straight from its codes, or None if it can."""
    if chunk_of(columns, block_size, SMALLEST_CHUNK) < SMALLEST_CHUNK:
        return f"rows of {columns} columns do not begin at 16 bytes of codes: K must be a multiple of {SMALLEST_CHUNK}."
    return None


def _check_activation(name: str, tensor: Tensor, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != columns or tensor.dtype != dtype or tensor.device != device:
        raise KernelError(
            f"{name} must be a {dtype} [M, {columns}] tensor on {device}, "
            f"got {tensor.dtype} {[*tensor.shape]} on {tensor.device}."
        )
    if dtype not in DTYPES or (tensor.stride(1) != 1 and columns > 1):
        raise KernelError(f"{name} must be float32, bfloat16 or float16 with contiguous rows.")


def _check_adapters(adapters: Sequence[Adapter], rows: int, columns: int, x: Tensor) -> None:
    """factor [rows, columns] with one of them None-like (0): the rank."""
    for adapter in adapters:
        rank = adapter.low.shape[1]
        shape = (rows or rank, columns or rank)
        _check_activation("h", adapter.low, rank, x.dtype, x.device)
        check("an adapter's factor", adapter.factor, DTYPES, 0, x.device)
        if adapter.factor.shape != shape or adapter.low.shape[0] != x.shape[0]:
            raise KernelError(f"A factor of shape {[*adapter.factor.shape]} does not fit: {[*shape]} is needed.")


def _rank_arguments(adapter: Adapter, scaled: bool) -> list[Any]:
    out: list[Any] = [adapter.factor]
    if scaled:
        out += [adapter.alpha, *([] if adapter.scaling is None else [adapter.scaling])]
    return out


def _spec(weight: Weight, given: Sequence[Adapter], **more: Any) -> dict[str, Any]:
    scaling = bool(given) and given[0].scaling is not None
    return {
        "quant_type": weight.quant_type,
        "double_quant": weight.data.absmax_scale is not None,
        "scaling": scaling,
        "uses_tiles": True,
        **more,
    }


def lora_linear_vector(
    x: Tensor,
    weights: Sequence[Weight],
    outs: Sequence[Tensor],
    h: Tensor,
    adapters: Sequence[Sequence[Adapter]],
    bias: Sequence[Tensor],
) -> None:
    """outs[i] [M, N_i] = x [M, K] W_i^T + bias_i + sum_j alpha_j scaling_j h_j B_j^T, one launch for the whole group.

    M <= MOST_VECTOR_ROWS; h [M, sum R] holds the h_j side by side, in the adapters' order.
    """
    for weight, out in zip(weights, outs, strict=True):
        _check_activation("out", out, weight.rows, out.dtype, x.device)
    launch = vector_launch(x, weights, adapters, bias)
    if x.shape[0]:
        launch(x, h, outs)


def vector_launch(
    x: Tensor, weights: Sequence[Weight], adapters: Sequence[Sequence[Adapter]], bias: Sequence[Tensor]
) -> Callable[[Tensor, Tensor, Sequence[Tensor]], None]:
    """The launch of `lora_linear_vector` for every x of this shape, dtype and device: called with x, h and the outs (rows
    of stride 1), it checks nothing."""
    m, k = x.shape
    first = weights[0]
    flat = [adapter for mine in adapters for adapter in mine]
    if m > MOST_VECTOR_ROWS:
        raise KernelError(f"lora_linear_vector takes at most {MOST_VECTOR_ROWS} rows of x, got {m}.")
    _check_activation("x", x, first.columns, x.dtype, x.device)
    for weight, mine in zip(weights, adapters, strict=True):
        weight.check(x.device)
        _check_adapters(mine, weight.rows, 0, x)
    rows, counts = next_power_of_2(max(m, 1)), tuple(len(mine) for mine in adapters)
    spec = _spec(first, flat, rows=rows, bias=bool(bias), adapters=counts, dropout=False)
    block_n = vector_rows(sum(weight.rows for weight in weights), rows, x.device)
    fixed: list[tuple[Tensor, list[Any], list[Any]]] = []  # the codes, what stands between them and each out, and after
    for i, (weight, mine) in enumerate(zip(weights, adapters)):
        after: list[Any] = [weight.rows]
        for adapter in mine:
            rank = adapter.factor.shape[1]
            after += [*_rank_arguments(adapter, True), rank, next_power_of_2(rank)]
        codes, *scales = weight.arguments()
        fixed.append((codes, [*scales, *bias[i : i + 1]], after))
    grid = (sum(cdiv(weight.rows, block_n) for weight in weights),)
    kernel = triton_build.load("lora_linear_small", **spec).lora_linear_small[grid]
    words = min(max(next_power_of_2(k // 8), 4), 128)  # 32 threads with four each
    blocks = {"BLOCK_SIZE": first.block_size, "BLOCK_N": block_n, "WORDS": words, "STAGES": 3}
    options = blocks | {"TYPE": TYPES[x.dtype], "num_warps": 4} | _LAUNCH

    def launch(x: Tensor, h: Tensor, outs: Sequence[Tensor]) -> None:
        arguments: list[Any] = [x, x.stride(0), *([h, h.stride(0)] if flat else []), m, k, k // 2]
        for out, (codes, between, after) in zip(outs, fixed, strict=True):
            # read as words of four bytes; a slice of a gathered buffer (FSDP2) may begin between two
            words = codes if codes.data_ptr() % 4 == 0 else codes.clone()
            arguments += [words, *between, out, out.stride(0), *after]
        with on_device(x):
            kernel(*arguments, **options)

    return launch


def vector_rows(n: int, rows: int, device: torch.device) -> int:
    """How many of a group's N weight rows a program takes, 4 or 8: with 8 x is read and laid out half as often, but eight
    programs a multiprocessor have to be left to wait for memory together, and more rows of x take the registers."""
    return 8 if rows <= 2 and n >= 8 * 8 * multiprocessors(device) else 4


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
    m, k = x.shape
    weight.check(x.device)
    _check_activation("x", x, weight.columns, x.dtype, x.device)
    _check_activation("out", out, weight.rows, out.dtype, x.device)
    _check_adapters(adapters, weight.rows, 0, x)
    if not m:
        return
    tiles = tiles or forward_tiles(m, x.dtype)
    chunk = chunk_of(k, weight.block_size, tiles.block_k)
    count = cdiv(m, tiles.block_m) * cdiv(weight.rows, tiles.block_n)
    cores = multiprocessors(x.device)
    steps = cdiv(k, tiles.block_k)
    splits = max(1, min(2 * cores // count, steps // 4, 16)) if m <= 64 else 1
    programs = 2 * cores if m <= 64 else cores  # decoding waits for memory: the registers hold a second one's tile
    target = out if splits == 1 else torch.empty(splits, m, weight.rows, dtype=torch.float32, device=x.device)
    here = adapters if splits == 1 else ()
    spec = _spec(weight, here, adapters=len(here), bias=bias is not None and splits == 1, splits=splits > 1)
    module = triton_build.load("lora_linear_gemm", **spec, dropout=False)
    arguments: list[Any] = [x, x.stride(0), *weight.arguments(), target, target.stride(-2)]
    arguments += [*([bias] if bias is not None and splits == 1 else []), m, weight.rows, k, k // 2]
    for adapter in here:
        rank = adapter.factor.shape[1]
        arguments += [adapter.low, adapter.low.stride(0), *_rank_arguments(adapter, True), rank, padded(rank)]
    with on_device(x):
        module.lora_linear_gemm[(min(count, programs) if splits == 1 else count, splits)](
            *arguments,
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
            **_LAUNCH,
        )
    if splits > 1:
        scaling = [a.scaling for a in adapters if a.scaling is not None]
        scale = Scale([a.alpha for a in adapters], scaling)
        lora_up(out, [a.low for a in adapters], [a.factor for a in adapters], scale, bias=bias, partial=target)


def lora_linear_dx(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Weight],
    adapters: Sequence[Adapter] = (),
    dropout: Dropout = NO_DROPOUT,
    tiles: Tiles | None = None,
) -> None:
    """dx [M, K] = sum_i dy_i W_i + sum_j mask_j(g_j A_j), straight from the codes; adapters hold g_j and A_j."""
    m, k = dx.shape
    dtype = dys[0].dtype
    for dy, weight in zip(dys, weights, strict=True):
        weight.check(dx.device)
        _check_activation("dy", dy, weight.rows, dtype, dx.device)
    _check_activation("dx", dx, weights[0].columns, dx.dtype, dx.device)
    _check_adapters(adapters, 0, k, dys[0])
    if not m:
        return
    first = weights[0]
    tiles = tiles or dx_tiles(m, dtype)
    chunk = chunk_of(k, first.block_size, tiles.block_k)
    spec = _spec(first, (), adapters=len(adapters), linears=len(weights), dropout=bool(dropout.seed))
    module = triton_build.load("lora_linear_dx", **spec)
    arguments: list[Any] = [dx, dx.stride(0), m, k, k // 2, *([dropout.keep] if dropout.seed else [])]
    for dy, weight in zip(dys, weights):
        arguments += [dy, dy.stride(0), *weight.arguments(), weight.rows]
    for j, adapter in enumerate(adapters):
        rank = adapter.factor.shape[0]
        arguments += [adapter.low, adapter.low.stride(0), adapter.factor, *dropout.seed[j : j + 1], rank, padded(rank)]
    with on_device(dx):
        module.lora_linear_dx[(cdiv(m, tiles.block_m), cdiv(k, tiles.block_k))](
            *arguments,
            BLOCK_SIZE=first.block_size,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            CHUNK=chunk,
            CHUNKS=tiles.block_k // chunk,
            STAGES=tiles.stages,
            TYPE=TYPES[dtype],
            num_warps=tiles.warps,
            **_LAUNCH,
        )


def dx_tiles(m: int, dtype: torch.dtype) -> Tiles:
    """The same for dx, where block_k counts columns of dx and block_n the terms of a step."""
    if dtype == torch.float32:
        return Tiles(min(max(next_power_of_2(m), 16), 64), 32, 64, 4, 2)
    if m <= 64:
        return Tiles(max(next_power_of_2(m), 16), 64, 64, 4, 3)
    return Tiles(128, 64, 128, 8, 3)
