"""`qlora::linear_cross_entropy`: output head and loss in one op, in chunks of rows, so that no [M, V] tensor is made.

    loss = Σ over rows with target ≠ ignore_index of  logsumexp(f(z)) - f(z)[target],   z = x Wᵀ + b   (f: scale, soft cap)

Shapes: M rows (tokens), K input features, V vocabulary. Where a gradient is wanted it is computed in the same sweep
(`cross_entropy_sweep.py`), of the *sum* of the losses: the incoming gradient, with a mean's division and a loss scale in
it, multiplies it in backward, so that nothing is small enough to vanish in fp16. Softmax and loss are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cross_entropy_sweep import Sweep, product_dtype
from .derivatives import once_differentiable
from .ops import define_op


@define_op
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    loss_kernel: str = "",
) -> Tensor:
    """x [..., K], W [V, K], b [V] or None, target int [...] -> the summed loss, fp32 [].

    z = scale (x Wᵀ + b), then soft_cap tanh(z / soft_cap) unless soft_cap is 0. `loss_kernel` forces one of those
    registered, where it takes the call. Raises IndexError for a target that is no class.
    """
    sweep = Sweep(x, weight, bias, target, ignore_index, scale, soft_cap, forced=loss_kernel)
    return sweep.run(False, False, False)[0]


@torch.library.register_fake("qlora::linear_cross_entropy")
def _(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@define_op
def linear_cross_entropy_grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    keep_logits: bool = False,
    loss_kernel: str = "",
) -> list[Tensor]:
    """[loss, dx like x (if need_dx), dW like W (if need_dw), db like b (if need_db)]: the gradients of the summed loss;
    with `keep_logits` then z = x Wᵀ + b [..., V] in x's dtype."""
    sweep = Sweep(x, weight, bias, target, ignore_index, scale, soft_cap, keep_logits, loss_kernel)
    return sweep.run(need_dx, need_dw, need_db)


@torch.library.register_fake("qlora::linear_cross_entropy_grads")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    keep_logits: bool = False,
    loss_kernel: str = "",
) -> list[Tensor]:
    wanted = ((x, need_dx), (weight, need_dw), (bias, need_db))
    loss = x.new_empty((), dtype=torch.float32)
    logits = [x.new_empty((*x.shape[:-1], weight.shape[0]))] if keep_logits else []
    return [loss, *(like.new_empty(like.shape) for like, need in wanted if need and like is not None), *logits]


@define_op
def linear_cross_entropy_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    loss_kernel: str = "",
) -> list[Tensor]:
    """[the summed loss, fp32 []; z = x Wᵀ + b [..., V]]. Autograd sees the loss only: `with_gradient` is for the logits."""
    return Sweep(x, weight, bias, target, ignore_index, scale, soft_cap, True, loss_kernel).run(False, False, False)


@torch.library.register_fake("qlora::linear_cross_entropy_logits")
def _(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Tensor]:
    return [x.new_empty((), dtype=torch.float32), x.new_empty((*x.shape[:-1], weight.shape[0]))]


class _WithGradients(torch.autograd.Function):
    """Forward computes the gradients of what needs one; backward multiplies them by the incoming number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        *given, kernel, keep_logits = rest
        with torch._C._AutoDispatchBelowAutograd():
            needs = ctx.needs_input_grad[:3]
            loss, *grads = torch.ops.qlora.linear_cross_entropy_grads(
                x, weight, bias, *given, *needs, keep_logits, kernel
            )
        logits = grads.pop() if keep_logits else None
        target, ignore_index = given[:2]
        # the loss is saved for its place in autograd's graph: on what it depends, the gradients do
        ctx.save_for_backward(loss, (target != ignore_index).any(), *grads)
        if logits is None:
            return loss
        ctx.mark_non_differentiable(logits)
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    @once_differentiable("qlora::linear_cross_entropy")
    def backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor, *_: Any) -> tuple[Any, ...]:
        _loss, counted, *of_sum = saved
        grads_of_sum = iter(of_sum)
        # the mean of no rows hands over 1 / 0, and 0 times that is no number
        grad = torch.where(counted, grad, 0.0)
        # in fp32: the product of a bf16 gradient and 1 / tokens is rounded once
        grads = (
            (g := next(grads_of_sum)).float().mul(grad).to(g.dtype) if need else None
            for need in ctx.needs_input_grad[:3]
        )
        return (*grads, *[None] * 6)


def _with_autograd(*args: Any) -> Tensor:
    """The op under autograd: what needs no gradient is not computed (evaluation, a frozen head)."""
    if _is_differentiated(args):
        return _WithGradients.apply(*_whole(args), False)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.qlora.linear_cross_entropy(*args)


def _with_autograd_and_logits(*args: Any) -> list[Tensor]:
    if _is_differentiated(args):
        return list(_WithGradients.apply(*_whole(args), True))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.qlora.linear_cross_entropy_logits(*args)


def _whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With `loss_kernel`: torch leaves out a last argument that has its default."""
    return args if len(args) == 8 else (*args, "")


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args[:3])


_LIBRARY = torch.library.Library("qlora", "FRAGMENT")
_LIBRARY.impl("linear_cross_entropy", _with_autograd, "Autograd")
_LIBRARY.impl("linear_cross_entropy_logits", _with_autograd_and_logits, "Autograd")


class _WithGradient(torch.autograd.Function):
    """(hidden [..., K], y = f(z) [..., V], W [V, K]) -> y; backward: dhidden = dz W, if there is a dy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor, weight: Tensor, scale: float, soft_cap: float) -> Tensor:
        ctx.scale, ctx.soft_cap = scale, soft_cap
        ctx.save_for_backward(weight, *([hidden] if soft_cap else []))
        return logits.data  # the same memory, no view: it may be written

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *hidden = ctx.saved_tensors
        dtype, product = weight.dtype, product_dtype(weight.dtype, grad.device.type)
        weight = weight.to(product)
        if ctx.scale != 1:
            grad = grad * ctx.scale
        if hidden:
            z = (hidden[0].to(product) @ weight.t()).float()  # once more: who reads the logits may have written them
            grad = grad * (1 - (z * (ctx.scale / ctx.soft_cap)).tanh_().square_())
        return (grad.to(product) @ weight).to(dtype), None, None, None, None


def with_gradient(hidden: Tensor, logits: Tensor, weight: Tensor, scale: float = 1.0, soft_cap: float = 0.0) -> Tensor:
    """The logits that `linear_cross_entropy_logits` gave, scaled and capped where their model does, as a function of what
    the head with the frozen `weight` read.

    Most training steps differentiate the loss alone. As an output of the compiled graph the logits would be given a
    gradient all the same, a tensor of zeros that is made, read and added; here backward runs only if one is asked for.
    """
    if not hidden.requires_grad:
        return logits
    return _WithGradient.apply(hidden, logits, weight, scale, soft_cap)  # type: ignore[no-any-return]
