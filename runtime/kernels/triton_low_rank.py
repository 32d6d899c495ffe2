"""LoRA's skinny products on a GPU as Python functions: one launch for all adapters that share a tensor.

M tokens, N output features, K input features, R ranks. Activations are rows with stride 1; A [R, K] and B [N, R] are
the parameters themselves (fp32, bf16 or fp16, any strides), rounded to the products' dtype where they are read. Sums are
fp32 and each output is rounded once. An adapter's scale is `alpha * scaling`: a number times a 0-dim tensor that is read
on the device, so nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...errors import KernelError
from . import triton_build
from .triton_common import DTYPES, FUSED, cdiv, multiprocessors, next_power_of_2
from .triton_launch import TENSOR, Launch, prepared

MOST_RANKS = 256  # of the adapters of one launch: more sums do not fit the registers
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LAUNCH = {"num_warps": 4, **FUSED}


class Scale(NamedTuple):
    """alpha_j * scaling_j of each adapter; `scaling` is empty where there is none."""

    alpha: Sequence[float]
    scaling: Sequence[Tensor]

    def spec(self) -> dict[str, bool]:
        return {"scaled": bool(self.alpha), "scaling": bool(self.scaling)}


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
        tensors = [seed.to(like.device, non_blocking=True), out]
        launch = prepared(("dropout_mask", keep), tensors, lambda: _mask_launch(m, k, keep))
        launch(tensors)
    return out


def _mask_launch(m: int, k: int, keep: float) -> Launch:
    kernel = triton_build.load("dropout_mask", dropout=True, uses_codes=False).dropout_mask
    grid = cdiv(m, 32), cdiv(k, 128)
    return Launch(kernel, grid, [TENSOR, TENSOR, m, k, keep], BLOCK_M=32, BLOCK_K=128, **_LAUNCH)


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
    given = [x, *_interleaved((factors,), scale, dropout)]
    what = "lora_down", *scale.alpha, dropout.keep
    launch = prepared(what, [*given, out], lambda: _down_launch(x, factors, out, scale, dropout))
    if not out.numel():
        return
    split = launch.splits > 1
    target = torch.empty(launch.splits, *out.shape, dtype=torch.float32, device=x.device) if split else out
    launch([*given, target])
    if split:
        sum_splits(target, out)


def _interleaved(lists: Sequence[Sequence[Tensor]], scale: Scale, dropout: Dropout) -> list[Tensor]:
    """Each adapter's tensors in turn, as the kernels take them: one of each list, its scaling, its seed."""
    lists = [of for of in (*lists, scale.scaling, dropout.seed) if of]
    return [tensor for mine in zip(*lists, strict=True) for tensor in mine]


def _down_launch(x: Tensor, factors: Sequence[Tensor], out: Tensor, scale: Scale, dropout: Dropout) -> Launch:
    m, k = x.shape
    ranks = sum(f.shape[0] for f in factors)
    _check_rows("x", x, m, k, x)
    _check_rows("out", out, m, ranks, x)
    for factor in factors:
        if factor.shape[1] != k or factor.dtype not in DTYPES or factor.device != x.device:
            raise KernelError(f"A factor of shape {[*factor.shape]} on {factor.device} does not fit x [{m}, {k}].")
    block_m = 16 if m <= 16 else 32 if m <= 64 or ranks > 64 else 64
    # several masks for one tile of x take registers
    block_k = 64 if x.dtype == torch.float32 or ranks > 64 or len(dropout.seed) > 1 else 128
    programs = cdiv(m, block_m)
    splits = _splits(programs, cdiv(k, block_k), m * ranks, x)
    arguments: list[Any] = [TENSOR, x.stride(0)]
    for j, factor in enumerate(factors):
        arguments += [TENSOR, *factor.stride(), *_scale_and_seed(j, scale, dropout)]
    arguments += [TENSOR, out.stride(0) if splits == 1 else ranks, m, k, *([dropout.keep] if dropout.seed else [])]
    return Launch(
        triton_build.load("lora_down", **_spec(factors, scale, dropout)).lora_down,
        (programs, splits),
        arguments,
        splits,
        **_ranks(factors),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        SPLITS=splits,
        TYPE=TYPES[x.dtype],
        **_LAUNCH,
    )


def _scale_and_seed(j: int, scale: Scale, dropout: Dropout) -> list[Any]:
    return [*scale.alpha[j : j + 1], *[TENSOR] * bool(scale.scaling), *[TENSOR] * bool(dropout.seed)]


def _splits(programs: int, blocks: int, numel: int, like: Tensor, most_each: int = 2) -> int:
    """Over how many programs a sum is divided so that at most so many a multiprocessor run; 1 where a split gains nothing.
    A power of two, for each number has code of its own: as an argument it costs registers, which spill."""
    wanted = most_each * multiprocessors(like.device)
    if programs * 2 > wanted or numel >= 2**24:
        return 1
    most = max(1, min(wanted // max(programs, 1), blocks // 2, 32))  # no programs: of an empty batch
    return 1 << most.bit_length() - 1


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """out = the sum of fp32 partial results [SPLITS, ...], in order: the same bits in every run."""
    if _is_turned(out):
        partial, out = partial.transpose(-1, -2), out.t()
    if not out.is_contiguous() or not partial.is_contiguous():
        out.copy_(partial.sum(0))
        return
    launch = prepared(("sum_splits",), [partial, out], lambda: _sum_launch(partial.shape[0], out.numel()))
    launch([partial, out])


def _is_turned(out: Tensor) -> bool:
    """Whether its columns lie one after the other in memory: the transpose of a contiguous matrix."""
    return out.dim() == 2 and not out.is_contiguous() and out.t().is_contiguous()


def _sum_launch(splits: int, numel: int) -> Launch:
    module = triton_build.load("lora_down", **_spec([torch.empty(1, 1)], NO_SCALE, NO_DROPOUT))
    block = 512
    grid = (cdiv(numel, block),)
    return Launch(module.sum_splits, grid, [TENSOR, TENSOR, numel, splits], BLOCK=block, **_LAUNCH)


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
    tensors = [y, *[t for t in (partial, bias) if t is not None], *_interleaved((h, factors), scale, dropout)]
    base = "splits" if partial is not None else "y" if accumulate else "none"
    what = "lora_up", *scale.alpha, base, bias is not None, dropout.keep, len(h)
    launch = prepared(what, tensors, lambda: _up_launch(y, h, factors, scale, bias, dropout, base, partial))
    if y.numel():
        launch(tensors)


def _up_launch(
    y: Tensor,
    h: Sequence[Tensor],
    factors: Sequence[Tensor],
    scale: Scale,
    bias: Tensor | None,
    dropout: Dropout,
    base: str,
    partial: Tensor | None,
) -> Launch:
    m, n = y.shape
    _check_rows("y", y, m, n, y)
    for part, factor in zip(h, factors, strict=True):
        _check_rows("h", part, m, factor.shape[1], y)
        if factor.shape[0] != n or factor.dtype not in DTYPES or factor.device != y.device:
            raise KernelError(f"A factor of shape {[*factor.shape]} on {factor.device} does not fit y [{m}, {n}].")
    arguments: list[Any] = [TENSOR, y.stride(0)]
    if partial is not None:
        arguments += [TENSOR, partial.stride(1)]
    if bias is not None:
        arguments.append(TENSOR)
    for j, (part, factor) in enumerate(zip(h, factors)):
        arguments += [TENSOR, part.stride(0), TENSOR, *factor.stride(), *_scale_and_seed(j, scale, dropout)]
    arguments += [m, n, *([dropout.keep] if dropout.seed else [])]
    block_m, block_n = (16 if m <= 16 else 64), 64
    return Launch(
        triton_build.load("lora_up", **_spec(factors, scale, dropout, base=base, bias=bias is not None)).lora_up,
        (cdiv(m, block_m), cdiv(n, block_n)),
        arguments,
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
    what = "lora_over_tokens", *scale.alpha, dropout.keep, len(outs)
    given = [right, *_interleaved((left, outs), scale, dropout)]
    launch = prepared(what, given, lambda: _tokens_launch(left, right, outs, scale, dropout))
    if not right.numel():
        for out in outs:
            out.zero_()
        return
    targets = outs
    if launch.splits > 1:
        targets = [_partial(launch.splits, out) for out in outs]
        given = [right, *_interleaved((left, targets), scale, dropout)]
    launch(given)
    if launch.splits > 1:
        for target, out in zip(targets, outs):
            sum_splits(target, out)


def _partial(splits: int, out: Tensor) -> Tensor:
    """fp32 [SPLITS, R, C], in memory as `out` is: then one launch sums it up."""
    rows, columns = out.shape
    shape = (splits, columns, rows) if _is_turned(out) else (splits, rows, columns)
    target = torch.empty(shape, dtype=torch.float32, device=out.device)
    return target.transpose(1, 2) if _is_turned(out) else target


def _tokens_launch(
    left: Sequence[Tensor], right: Tensor, outs: Sequence[Tensor], scale: Scale, dropout: Dropout
) -> Launch:
    m, c = right.shape
    _check_rows("right", right, m, c, right)
    for part, out in zip(left, outs, strict=True):
        _check_rows("left", part, m, out.shape[0], right)
        if out.shape[1] != c or out.dtype not in DTYPES or out.device != right.device:
            raise KernelError(f"A result of shape {[*out.shape]} on {out.device} does not fit right [{m}, {c}].")
    block_m = 32 if right.dtype == torch.float32 else 64
    block_c = 64 if sum(padded(o.shape[0]) for o in outs) <= 128 else 32
    programs = cdiv(c, block_c)
    # an H200, 4096 tokens: 17 us by 8 splits of C=4096, 21 by 4; 36 by 4 of 14336, 61 by none
    splits = _splits(programs, cdiv(m, block_m), max(o.numel() for o in outs), right, most_each=7)
    arguments: list[Any] = [TENSOR, right.stride(0)]
    for j, (part, out) in enumerate(zip(left, outs)):
        strides = out.stride() if splits == 1 else (1, out.shape[0]) if _is_turned(out) else (c, 1)
        arguments += [TENSOR, part.stride(0), TENSOR, *strides, *_scale_and_seed(j, scale, dropout)]
    arguments += [m, c, *([dropout.keep] if dropout.seed else [])]
    return Launch(
        triton_build.load("lora_over_tokens", **_spec(outs, scale, dropout)).lora_over_tokens,
        (programs, splits),
        arguments,
        splits,
        **_ranks(outs),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        SPLITS=splits,
        TYPE=TYPES[right.dtype],
        **_LAUNCH,
    )
