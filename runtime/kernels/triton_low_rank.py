"""LoRA's skinny products on a GPU as Python functions: one launch for all adapters that share a tensor.

M tokens, N output features, K input features, R ranks. Activations are rows with stride 1; A [R, K] and B [N, R] are
the parameters themselves (fp32, bf16 or fp16, any strides), rounded to the products' dtype where they are read. Sums are
fp32 and each output is rounded once. An adapter's scale is `alpha * scaling`: a number times a 0-dim tensor that is read
on the device, so nothing here waits for the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...errors import KernelError
from . import triton_build
from .triton_common import DTYPES, cdiv, multiprocessors, next_power_of_2, on_device

MOST_RANKS = 256  # of the adapters of one launch: more sums do not fit the registers
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


class Scale(NamedTuple):
    """alpha_j * scaling_j of each adapter; `scaling` is empty where there is none."""

    alpha: Sequence[float]
    scaling: Sequence[Tensor]

    def spec(self) -> dict[str, bool]:
        return {"scaled": bool(self.alpha), "scaling": bool(self.scaling)}

    def arguments(self, j: int) -> list[Any]:
        return [*self.alpha[j : j + 1], *self.scaling[j : j + 1]]


class Dropout(NamedTuple):
    """The seed of each adapter's mask, an int64 tensor on the device, and the probability that an element stays."""

    seed: Sequence[Tensor]
    keep: float


NO_SCALE = Scale([], [])
NO_DROPOUT = Dropout([], 1.0)


def dropout_mask(seed: Tensor, like: Tensor, keep: float) -> Tensor:
    """1 / keep or 0 for each element of `like` [M, K], in its dtype: what the kernels draw from this seed themselves."""
    m, k = like.shape
    out = torch.empty((m, k), dtype=like.dtype, device=like.device)
    if out.numel():
        module = triton_build.load("dropout_mask", dropout=True, uses_codes=False)
        with on_device(out):
            module.dropout_mask[(cdiv(m, 32), cdiv(k, 128))](
                seed.to(like.device, non_blocking=True), out, m, k, keep, BLOCK_M=32, BLOCK_K=128, num_warps=4
            )
    return out


def covers(*factors: Tensor) -> bool:
    """Whether these A or B of one launch suit the kernels."""
    ranks = sum(padded(min(f.shape)) for f in factors)
    return bool(factors) and ranks <= MOST_RANKS and all(f.dtype in DTYPES for f in factors)


def padded(rank: int) -> int:
    """A tile's ranks: a power of two, and at least what a tensor core takes."""
    return max(next_power_of_2(rank), 16)


def _check_rows(name: str, tensor: Tensor, rows: int, columns: int, like: Tensor) -> None:
    if tensor.shape != (rows, columns) or tensor.dtype not in DTYPES or tensor.device != like.device:
        raise KernelError(
            f"{name} must be a floating [{rows}, {columns}] tensor on {like.device}, "
            f"got {tensor.dtype} {[*tensor.shape]} on {tensor.device}."
        )
    if tensor.stride(1) != 1 and columns > 1:
        raise KernelError(f"{name} must have contiguous rows, its columns are {tensor.stride(1)} elements apart.")


def _ranks(factors: Sequence[Tensor]) -> dict[str, int]:
    out: dict[str, int] = {}
    for j, factor in enumerate(factors):
        out |= {f"R{j}": factor.shape[0], f"P{j}": padded(factor.shape[0])}
    if sum(padded(f.shape[0]) for f in factors) > MOST_RANKS:
        raise KernelError(f"The adapters of one launch have more than {MOST_RANKS} ranks together.")
    return out


def _spec(factors: Sequence[Tensor], scale: Scale, dropout: Dropout, **more: Any) -> dict[str, Any]:
    spec = {"adapters": len(factors), "dropout": bool(dropout.seed), **scale.spec(), **more}
    return spec | {"uses_codes": False, "uses_tiles": False}


def lora_down(
    x: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    scale: Scale = NO_SCALE,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out [M, sum R] = scale_j dropout_j(x [M, K]) F_j^T for every F_j [R_j, K], side by side."""
    ranks = sum(f.shape[0] for f in factors)
    _check_rows("x", x, x.shape[0], x.shape[1], x)
    _check_rows("out", out, x.shape[0], ranks, x)
    if out.numel():
        down_launch(x, factors, scale, dropout)(x, out)


def down_launch(
    x: Tensor, factors: Sequence[Tensor], scale: Scale = NO_SCALE, dropout: Dropout = NO_DROPOUT
) -> Callable[[Tensor, Tensor], None]:
    """The launch of `lora_down` for every x of this shape, dtype and device: called with x and out, it checks nothing."""
    m, k = x.shape
    for factor in factors:
        if factor.shape[1] != k or factor.dtype not in DTYPES or factor.device != x.device:
            raise KernelError(f"A factor of shape {[*factor.shape]} on {factor.device} does not fit x [{m}, {k}].")
    ranks = sum(f.shape[0] for f in factors)
    block_m = 16 if m <= 16 else 32 if m <= 64 or ranks > 64 else 64
    # several masks for one tile of x take registers
    block_k = 64 if x.dtype == torch.float32 or ranks > 64 or len(dropout.seed) > 1 else 128
    programs = cdiv(m, block_m)
    splits = _splits(programs, cdiv(k, block_k), m * ranks, x)
    kernel = triton_build.load("lora_down", **_spec(factors, scale, dropout)).lora_down[(programs, splits)]
    fixed: list[Any] = []
    for j, factor in enumerate(factors):
        fixed += [factor, *factor.stride(), *scale.arguments(j), *dropout.seed[j : j + 1]]
    sizes = [m, k, *([dropout.keep] if dropout.seed else [])]
    blocks = {"BLOCK_M": block_m, "BLOCK_K": block_k, "SPLITS": splits, "TYPE": TYPES[x.dtype]}
    options = _ranks(factors) | blocks | _LAUNCH

    def launch(x: Tensor, out: Tensor) -> None:
        target = out if splits == 1 else torch.empty(splits, m, ranks, dtype=torch.float32, device=x.device)
        with on_device(x):
            kernel(x, x.stride(0), *fixed, target, target.stride(-2), *sizes, **options)
        if splits > 1:
            sum_splits(target, out)

    return launch


def _splits(programs: int, blocks: int, numel: int, like: Tensor) -> int:
    """Over how many programs a sum is divided so that two programs a multiprocessor run; 1 where a split gains nothing."""
    wanted = 2 * multiprocessors(like.device)
    if programs * 2 > wanted or numel >= 2**24:
        return 1
    return max(1, min(wanted // programs, blocks // 2, 32))


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """out = the sum of fp32 partial results [SPLITS, ...], in order: the same bits in every run."""
    if not out.is_contiguous():
        out.copy_(partial.sum(0))
        return
    block = 512
    with on_device(out):
        _sums().sum_splits[(cdiv(out.numel(), block),)](
            partial, out, out.numel(), SPLITS=partial.shape[0], BLOCK=block, **_LAUNCH
        )


@functools.cache
def _sums() -> Any:
    return triton_build.load("lora_down", **_spec([torch.empty(1, 1)], NO_SCALE, NO_DROPOUT))


def lora_up(
    y: Tensor,
    h: Sequence[Tensor],
    factors: Sequence[Tensor],
    scale: Scale = NO_SCALE,
    *,
    bias: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    accumulate: bool = True,
    partial: Tensor | None = None,
) -> None:
    """y [M, N] (+)= bias + sum_j scale_j (h_j [M, R_j] F_j [N, R_j]^T), dropped by adapter j's mask if there is dropout.

    `partial` fp32 [SPLITS, M, N] (rows of any stride): added as well, instead of y's old value.
    """
    m, n = y.shape
    _check_rows("y", y, m, n, y)
    for part, factor in zip(h, factors, strict=True):
        _check_rows("h", part, m, factor.shape[1], y)
        if factor.shape[0] != n or factor.dtype not in DTYPES or factor.device != y.device:
            raise KernelError(f"A factor of shape {[*factor.shape]} on {factor.device} does not fit y [{m}, {n}].")
    if not y.numel():
        return
    base = "splits" if partial is not None else "y" if accumulate else "none"
    module = triton_build.load("lora_up", **_spec(factors, scale, dropout, base=base, bias=bias is not None))
    arguments: list[Any] = [y, y.stride(0)]
    if partial is not None:
        arguments += [partial, partial.stride(1)]
    if bias is not None:
        arguments.append(bias)
    for j, (part, factor) in enumerate(zip(h, factors)):
        arguments += [part, part.stride(0), factor, *factor.stride(), *scale.arguments(j), *dropout.seed[j : j + 1]]
    arguments += [m, n, *([dropout.keep] if dropout.seed else [])]
    block_m, block_n = (16 if m <= 16 else 64), 64
    with on_device(y):
        module.lora_up[(cdiv(m, block_m), cdiv(n, block_n))](
            *arguments,
            **_ranks([f.t() for f in factors]),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SPLITS=1 if partial is None else partial.shape[0],
            TYPE=TYPES[h[0].dtype if h else torch.float32],
            **_LAUNCH,
        )


def lora_over_tokens(
    left: Sequence[Tensor],
    right: Tensor,
    outs: Sequence[Tensor],
    scale: Scale = NO_SCALE,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out_j [R_j, C] = scale_j left_j [M, R_j]^T dropout_j(right [M, C]), summed over the tokens M; any strides of out_j."""
    m, c = right.shape
    _check_rows("right", right, m, c, right)
    for part, out in zip(left, outs, strict=True):
        _check_rows("left", part, m, out.shape[0], right)
        if out.shape[1] != c or out.dtype not in DTYPES or out.device != right.device:
            raise KernelError(f"A result of shape {[*out.shape]} on {out.device} does not fit right [{m}, {c}].")
    if not m or not c:
        for out in outs:
            out.zero_()
        return
    module = triton_build.load("lora_over_tokens", **_spec(outs, scale, dropout))
    block_m = 32 if right.dtype == torch.float32 else 64
    block_c = 64 if sum(padded(o.shape[0]) for o in outs) <= 128 else 32
    programs = cdiv(c, block_c)
    splits = _splits(programs, cdiv(m, block_m), max(o.numel() for o in outs), right)
    targets = outs
    if splits > 1:
        targets = [torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device) for out in outs]
    arguments: list[Any] = [right, right.stride(0)]
    for j, (part, target) in enumerate(zip(left, targets)):
        strides = target.stride()[-2:]
        arguments += [part, part.stride(0), target, *strides, *scale.arguments(j), *dropout.seed[j : j + 1]]
    arguments += [m, c, *([dropout.keep] if dropout.seed else [])]
    with on_device(right):
        module.lora_over_tokens[(programs, splits)](
            *arguments,
            **_ranks(outs),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            SPLITS=splits,
            TYPE=TYPES[right.dtype],
            **_LAUNCH,
        )
    if splits > 1:
        for target, out in zip(targets, outs):
            sum_splits(target, out)
