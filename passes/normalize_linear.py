"""Every spelling of a linear -> F.linear(x, W, bias).

    x @ W.T, torch.matmul(x, W.t()), torch.mm    ->  F.linear(x, W)
    x @ W               (W is [in, out])         ->  F.linear(x, W.t())
    torch.addmm(b, x, W) (GPT-2's Conv1D)        ->  F.linear(x, W.t(), b)
    F.linear(x, weight=W, bias=b)                ->  F.linear(x, W, b)

W is a 2-D parameter, or an expression over parameters only (an adapted weight); x is not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import LINEAR, emit, is_call, is_linear, peel_transposes, rank_of, replace, value
from ..pass_manager import PassContext

_PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")


def normalize_linear(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite each spelling to the canonical one; returns how many were not canonical already."""
    count = 0
    for node in list(gm.graph.nodes):
        if is_linear(node):
            count += _positional(node)
        elif is_call(node, *_PRODUCTS) and not node.kwargs:
            count += _rewrite(node, node.args[0], node.args[1], None, ctx)
        elif is_call(node, torch.addmm, "addmm"):
            count += _rewrite_addmm(node, ctx)
    return count


def _positional(node: fx.Node) -> int:
    if not node.kwargs and len(node.args) == 3:
        return 0
    x, weight, bias = (*node.args, *[None] * 3)[:3]
    arguments = {"input": x, "weight": weight, "bias": bias} | dict(node.kwargs)
    node.args, node.kwargs = (arguments["input"], arguments["weight"], arguments["bias"]), {}
    return 1


def _rewrite_addmm(node: fx.Node, ctx: PassContext) -> int:
    names = {"self": 0, "input": 0, "mat1": 1, "mat2": 2}
    args: list[Any] = [*node.args, *[None] * 3][:3]
    for key, index in names.items():
        if key in node.kwargs:
            args[index] = node.kwargs[key]
    if any(node.kwargs.get(key, 1) != 1 for key in ("beta", "alpha")):
        ctx.decline(node.name, "addmm with alpha or beta other than 1")
        return 0
    bias, x, weight = args
    if rank_of(bias) != 1:
        return 0
    return _rewrite(node, x, weight, bias, ctx)


def _rewrite(node: fx.Node, x: Any, weight: Any, bias: Any, ctx: PassContext) -> int:
    """product(x, weight) with weight [in, out] -> F.linear(x, weight.t()): a transpose on either side cancels."""
    root, odd = peel_transposes(weight)
    if not isinstance(x, fx.Node) or not is_weight(root, ctx) or is_weight(peel_transposes(x)[0], ctx):
        return 0
    inner = weight
    if odd and weight is not root:
        inner = _under_transpose(weight)
    else:
        inner = emit(node, "t", (weight,), node, method=True)
        shape = value(weight)
        inner.meta["example_value"] = shape.t() if isinstance(shape, torch.Tensor) else None
    replace(node, emit(node, LINEAR, (x, inner, bias), node))
    return 1


def _under_transpose(node: Any) -> Any:
    """W.t() -> W, keeping casts that stand between them out of the way."""
    odd = peel_transposes(node)[1]
    while odd:
        node = node.args[0]
        odd = peel_transposes(node)[1]
    return node


def is_weight(node: Any, ctx: PassContext) -> bool:
    """A 2-D parameter, or a 2-D expression whose only inputs are parameters and state (`densify(W) + B @ A`)."""
    if not isinstance(node, fx.Node) or rank_of(node) != 2:
        return False
    if node.op == "placeholder":
        return ctx.param(node) is not None
    return _only_params(node, ctx, depth=24)


def _only_params(node: fx.Node, ctx: PassContext, depth: int) -> bool:
    if node.op == "placeholder":
        return ctx.param(node) is not None or node.name in ctx.state or rank_of(node) == 0
    if depth == 0 or node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    return all(_only_params(source, ctx, depth - 1) for source in node.all_input_nodes)
