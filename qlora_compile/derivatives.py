"""Ops that can be differentiated once: what a second derivative through them raises, where autograd would take zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .errors import SecondDerivativeError

Autograd = Callable[..., Any]  # backward(ctx, *grads) -> gradients: tensors, None, and lists of them


def once_differentiable(op: str) -> Callable[[Callable[..., Any]], Autograd]:
    """backward(ctx, saved tensors, *grads) of `op` -> backward(ctx, *grads), whose results raise SecondDerivativeError where
    they are differentiated once more.

    With `create_graph=True` autograd takes what an op without a derivative of its own gave for a constant. torch's decorator
    of this name knows no lists, and lets through what depends on saved tensors alone (`loss.backward(create_graph=True)`).
    """

    def decorate(backward: Callable[..., Any]) -> Autograd:
        @functools.wraps(backward)
        def once(ctx: Any, *grads: Any) -> Any:
            saved = ctx.saved_tensors  # once: activation checkpointing hands them out once
            if not torch.is_grad_enabled():
                return backward(ctx, saved, *grads)
            with torch.no_grad():
                found, spec = tree_flatten(backward(ctx, saved, *grads))
            tensors = [each for each in found if isinstance(each, Tensor)]
            read = [t for t in tree_leaves((saved, grads)) if isinstance(t, Tensor) and t.requires_grad]
            marked = iter(_Refused.apply(op, len(tensors), *tensors, *read) if tensors else ())
            return tree_unflatten([next(marked) if isinstance(each, Tensor) else each for each in found], spec)

        return once

    return decorate


class _Refused(torch.autograd.Function):
    """(op, how many gradients, *gradients, *what they depend on) -> the gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(grad.detach() for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise SecondDerivativeError(ctx.op)
