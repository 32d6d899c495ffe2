"""The ops of a mixture of experts, namespace `qlora::`: schema, plain-torch reference, fake and autograd of each.

Fused experts are one parameter of E matrices, [E, out, in] or [E, in, out]. In 4 bits each matrix is its own run of
blocks with its own scales, so that one expert is decoded without touching another:

    codes uint8 [E, ceil(n/2)], absmax [E, blocks], and if double-quantized absmax_scale [E, ceil(blocks/256)] and
    absmax_offset [E]: row e holds the bytes that `quantize_4bit` gives for matrix e alone.

    grouped_lora_linear:  y_s = x_s W_eᵀ + Σ_j alpha_j scaling_j x_s A_jeᵀ B_jeᵀ   for the rows s of expert e

Rows are sorted by expert; `offsets[e]` is where those of expert e end (`torch.nn.functional.grouped_mm`'s `offs`). Only
experts that have rows are decoded, forward and backward, and nothing dense is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import once_differentiable
from .expert_products import ExpertGroup, decode_expert
from .lora_group import as_rows
from .ops import define_op


@define_op
def dequantize_experts(
    codes: Tensor, scales: Sequence[Tensor], shape: Sequence[int], quant_type: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    """codes [E, ceil(n/2)] and scales ([absmax] or [absmax, scale, offset]) -> dense `shape` [E, a, b] in `dtype`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    for expert, matrix in enumerate(out):
        decode_expert(matrix, codes, scales, expert, quant_type, block_size)
    return out


@torch.library.register_fake("qlora::dequantize_experts")
def _(
    codes: Tensor, scales: Sequence[Tensor], shape: Sequence[int], quant_type: str, block_size: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(tuple(shape), dtype=dtype)


@define_op
def grouped_lora_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[Tensor],
    alpha: Sequence[float],
    out_features: int,
    transposed: bool,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
    forward_kernel: str = "",
    backward_kernel: str = "",
) -> list[Tensor]:
    """x [S, K] -> [y [S, N] in x's dtype, h [S, sum R] in `dtype`]; rows after the last offset give zero.

    `weight` holds the codes, or (`quant_type` "none") the dense matrices; `scales` is [absmax] or [absmax, scale,
    offset]. A_j is [E, R, K], B_j [E, N, R], `scaling` 0-dim tensors, or [S] where it differs by row. `forward_kernel`
    and `backward_kernel` force one of those registered, where it takes the call.
    """
    group = ExpertGroup(
        offsets, weight, scales, lora_a, lora_b, scaling, alpha,
        (out_features, x.shape[1]), transposed, quant_type, block_size, dtype,
    )  # fmt: skip
    rows = as_rows(x, dtype)
    y, h = group.implementation("grouped_lora_linear", rows, forward_kernel)(group, rows)
    return [y.to(x.dtype), h]


@torch.library.register_fake("qlora::grouped_lora_linear")
def _(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[Tensor],
    alpha: Sequence[float],
    out_features: int,
    transposed: bool,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
    forward_kernel: str = "",
    backward_kernel: str = "",
) -> list[Tensor]:
    h = x.new_empty((x.shape[0], sum(a.shape[1] for a in lora_a)), dtype=dtype)
    return [x.new_empty((x.shape[0], out_features)), h]


@define_op
def grouped_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[Tensor],
    alpha: Sequence[float],
    transposed: bool,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_adapters: bool,
    backward_kernel: str = "",
) -> list[Tensor]:
    """dy [S, N] -> [dx like x (if need_dx), dA_j like A_j..., dB_j like B_j... (if need_adapters)]."""
    group = ExpertGroup(
        offsets, weight, scales, lora_a, lora_b, scaling, alpha,
        (dy.shape[1], x.shape[1]), transposed, quant_type, block_size, dtype,
    )  # fmt: skip
    rows = as_rows(x, dtype)
    run = group.implementation("grouped_lora_linear_backward", rows, backward_kernel)
    dx, da, db = run(group, as_rows(dy, dtype), rows, h, need_dx, need_adapters)
    return [*([] if dx is None else [dx.to(x.dtype)]), *da, *db]


@torch.library.register_fake("qlora::grouped_lora_linear_backward")
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[Tensor],
    alpha: Sequence[float],
    transposed: bool,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_adapters: bool,
    backward_kernel: str = "",
) -> list[Tensor]:
    dx = [x.new_empty(x.shape)] if need_dx else []
    factors = [*lora_a, *lora_b] if need_adapters else []
    return [*dx, *(torch.empty_like(factor) for factor in factors)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, offsets, weight, scales, lora_a, lora_b, scaling, *ctx.numbers = inputs
    ctx.save_for_backward(x, output[1], offsets, weight, *scales, *lora_a, *lora_b, *scaling)
    ctx.lengths = [len(scales), len(lora_a), len(lora_b), len(scaling)]
    ctx.set_materialize_grads(False)


@once_differentiable("qlora::grouped_lora_linear")
def _backward(ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, h, offsets, weight, *flat = saved
    lists: list[list[Tensor]] = []
    for length in ctx.lengths:
        lists.append(flat[:length])
        flat = flat[length:]
    alpha, _, transposed, quant_type, block_size, dtype, _, kernel = ctx.numbers
    scales, lora_a, lora_b, scaling = lists
    needs = ctx.needs_input_grad
    need_dx, need_adapters = bool(needs[0]), any(needs[4]) or any(needs[5])
    dx, da, db = None, [None] * len(lora_a), [None] * len(lora_b)
    if grads[0] is not None and (need_dx or need_adapters):
        out = torch.ops.qlora.grouped_lora_linear_backward(
            grads[0], x, h, offsets, weight, scales, lora_a, lora_b, scaling, alpha,
            transposed, quant_type, block_size, dtype, need_dx, need_adapters, kernel,
        )  # fmt: skip
        dx = out.pop(0) if need_dx else None
        if need_adapters:
            da, db = out[: len(lora_a)], out[len(lora_a) :]
    no_alpha: Any = [] if not alpha else None  # an empty list counts as a list of tensors, one of numbers as one value
    return (
        dx,
        None,
        None,
        [None] * len(scales),
        da,
        db,
        [None] * len(scaling),
        no_alpha,
        *[None] * (len(needs) - 8),  # arguments left at their defaults are not counted
    )


torch.library.register_autograd("qlora::grouped_lora_linear", _backward, setup_context=_setup_context)
