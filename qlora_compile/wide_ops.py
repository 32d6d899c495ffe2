"""Dense products of bf16 (fp16) tensors computed in fp32: for CPUs without bf16 matrix instructions.

    wide_linear:     y = x Wᵀ + b           wide_matmul:  y = a b (batched)

Inputs, outputs and what is saved for backward have the tensors' own dtype; each result is rounded once. A linear is one
generated product (FUSED), or the library's (LIBRARY) of fp32 copies in reused buffers, of a bounded number of rows; batches
are the library's. M rows, N output features, K input features. `widen_matmuls` puts these ops into a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import once_differentiable
from .lora_group import as_rows, kernel_for, scratch
from .ops import define_op

FUSED, LIBRARY = "fused_fp32", "fp32_gemm"  # their names in the table, as candidates for "dense_linear"
NO_BATCHES = ((FUSED, "for one matrix, not for batches"),)  # what a batched product rules out
WEIGHT_ROWS = 4096  # rows of a dense weight at a time: a vocabulary's worth of fp32 is never there at once


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _widened(name: str, x: Tensor) -> Tensor:
    """x [rows, columns] in a reused fp32 buffer."""
    return scratch(name, (x.shape[0], x.shape[1]), x, torch.float32).copy_(x)


def _gemm(linear_kernel: str, device: torch.device) -> Callable[..., None] | None:
    """The generated product, if that was chosen; None for the library's."""
    return kernel_for("wide_gemm", device) if linear_kernel == FUSED else None


def _contiguous_one_way(weight: Tensor) -> Tensor:
    """As `wide_gemm` reads a matrix."""
    return weight if 1 in weight.stride() else weight.contiguous()


# --- linear ----------------------------------------------------------------------------------------------------------


@define_op
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, linear_kernel: str) -> Tensor:
    """x [..., K], W [N, K], b [N] -> x Wᵀ + b [..., N] in x's dtype, forward and backward by FUSED or LIBRARY."""
    n = weight.shape[0]
    rows = as_rows(x, x.dtype)
    out = x.new_empty((rows.shape[0], n))
    gemm = _gemm(linear_kernel, x.device)
    if gemm is not None:
        gemm([(rows, _contiguous_one_way(weight).t(), 1.0)], out, bias if bias is None else bias.contiguous())
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], n))
    wide = rows.float()
    for part in _ranges(n, WEIGHT_ROWS):
        y = scratch("y", (rows.shape[0], part.stop - part.start), x, torch.float32)
        torch.mm(wide, _widened("weight", weight[part]).t(), out=y)
        out[:, part] = y if bias is None else y.add_(bias[part])
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], n))


@torch.library.register_fake("qlora::wide_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, linear_kernel: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define_op
def wide_linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, need_dx: bool, linear_kernel: str
) -> list[Tensor]:
    """dy [..., N] -> [dx [..., K] (if need_dx), dW [N, K] (if there is x)]."""
    n, k = weight.shape
    dys = as_rows(dy, dy.dtype)
    gemm = _gemm(linear_kernel, dy.device)
    if gemm is not None:
        return _backward_by(gemm, dys, x, _contiguous_one_way(weight), (*dy.shape[:-1], k) if need_dx else None)
    rows = x.reshape(-1, k).float() if x is not None else None
    dx = torch.zeros((dys.shape[0], k), dtype=torch.float32, device=dy.device) if need_dx else None
    dw = torch.empty_like(weight) if x is not None else None
    for part in _ranges(n, WEIGHT_ROWS):
        wide = _widened("y", dys[:, part])
        if dx is not None:
            dx.addmm_(wide, _widened("weight", weight[part]))
        if dw is not None and rows is not None:
            dw[part] = wide.t() @ rows
    grads = [] if dx is None else [dx.to(dy.dtype).view(*dy.shape[:-1], k)]
    return grads if dw is None else [*grads, dw]


def _backward_by(
    gemm: Callable[..., None], dy: Tensor, x: Tensor | None, weight: Tensor, shape: Sequence[int] | None
) -> list[Tensor]:
    """[dx of this shape, dW], those that are wanted."""
    grads = []
    if shape is not None:
        dx = dy.new_empty((len(dy), weight.shape[1]))
        gemm([(dy, weight, 1.0)], dx)
        grads.append(dx.view(shape))
    if x is not None:
        grads.append(torch.empty_like(weight))
        gemm([(dy.t(), as_rows(x, x.dtype), 1.0)], grads[-1])
    return grads


@torch.library.register_fake("qlora::wide_linear_backward")
def _(dy: Tensor, x: Tensor | None, weight: Tensor, need_dx: bool, linear_kernel: str) -> list[Tensor]:
    dx = [dy.new_empty((*dy.shape[:-1], weight.shape[1]))] if need_dx else []
    return dx if x is None else [*dx, torch.empty_like(weight)]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.linear_kernel = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
    ctx.bias_dtype = bias.dtype if bias is not None else None


@once_differentiable("qlora::wide_linear")
def _linear_backward(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Any, ...]:
    x, weight = saved
    need_dx, need_dw, need_db, _ = ctx.needs_input_grad
    wanted = need_dx or need_dw
    grads = torch.ops.qlora.wide_linear_backward(dy, x, weight, need_dx, ctx.linear_kernel) if wanted else []
    dx = grads.pop(0) if need_dx else None
    dw = grads.pop(0) if need_dw else None
    return dx, dw, dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if need_db else None, None


torch.library.register_autograd("qlora::wide_linear", _linear_backward, setup_context=_linear_setup)

# --- batched product -------------------------------------------------------------------------------------------------


@define_op
def wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`torch.matmul` of two tensors of two or more dimensions, in their dtype."""
    return torch.matmul(a.float(), b.float()).to(a.dtype)


@torch.library.register_fake("qlora::wide_matmul")
def _(a: Tensor, b: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]))


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b = inputs
    ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
    ctx.shapes = a.shape, b.shape


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    a, b = ctx.saved_tensors
    product = torch.ops.qlora.wide_matmul
    da = product(dy, b.mT).sum_to_size(ctx.shapes[0]) if b is not None else None
    db = product(a.mT, dy).sum_to_size(ctx.shapes[1]) if a is not None else None
    return da, db


torch.library.register_autograd("qlora::wide_matmul", _matmul_backward, setup_context=_matmul_setup)
