"""Every spelling of a linear -> F.linear(x, W, bias).

    x @ W.T, torch.matmul(x, W.t()), torch.mm    ->  F.linear(x, W)
    x @ W               (W is [in, out])         ->  F.linear(x, W.t())
    torch.addmm(b, x, W)                         ->  F.linear(x, W.t(), b)
    addmm(b, x.view(-1, K), W).view(..., N)      ->  F.linear(x, W.t(), b)        (GPT-2's Conv1D)
    F.linear(x, weight=W, bias=b)                ->  F.linear(x, W, b)

W is a 2-D parameter, or an expression over parameters only (an adapted weight); x is not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import (
    LINEAR,
    emit,
    emit_valued,
    is_call,
    is_linear,
    peel_casts,
    peel_transposes,
    rank_of,
    replace,
    value,
)
from ..pass_manager import PassContext

_PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
_VIEWS = (torch.reshape, "view", "reshape")


def normalize_linear(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Rewrite each spelling to the canonical one; returns how many were not canonical already."""
    count = 0
    for node in list(gm.graph.nodes):
        if is_linear(node):
            count += _positional(node)
        elif is_call(node, *_PRODUCTS):
            count += _rewrite_product(node, ctx)
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


def _rewrite_product(node: fx.Node, ctx: PassContext) -> int:
    given = dict(zip(("input", "other"), node.args)) | dict(node.kwargs)
    x, weight = given.pop("input", None), given.pop("other", given.pop("mat2", None))
    if given or not _is_product(x, weight, ctx):
        return 0
    return _rewrite(node, x, weight, None)


def _rewrite_addmm(node: fx.Node, ctx: PassContext) -> int:
    given = dict(zip(("input", "mat1", "mat2"), node.args)) | dict(node.kwargs)
    x, weight, bias = given.pop("mat1", None), given.pop("mat2", None), given.pop("input", given.pop("self", None))
    if not _is_product(x, weight, ctx):
        return 0
    if any(given.pop(key, 1) != 1 for key in ("beta", "alpha")):
        ctx.decline(node.name, "addmm with alpha or beta other than 1")
        return 0
    if rank_of(bias) != 1:
        ctx.decline(node.name, f"addmm adds a tensor of {rank_of(bias)} dimensions, a bias has one")
        return 0
    return _rewrite(node, x, weight, bias) if not given else 0


def _is_product(x: Any, weight: Any, ctx: PassContext) -> bool:
    """Activations times a weight: two weights are an expression, a weight times activations is no linear."""
    roots = [peel_transposes(operand)[0] for operand in (x, weight)]
    return isinstance(x, fx.Node) and is_weight(roots[1], ctx) and not is_weight(roots[0], ctx)


def _rewrite(node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any) -> int:
    """product(x, weight) with weight [in, out] -> F.linear(x, weight.t()): a transpose on either side cancels."""
    inner: Any
    if peel_casts(weight) is weight and peel_transposes(weight)[0] is not weight:
        inner = weight.args[0]  # the outermost call is a transpose
    else:
        inner = emit_valued(node, "t", (weight,), node, method=True)
    old, x = _without_views(node, x)
    replace(old, emit(node, LINEAR, (x, inner, bias), node))
    return 1


def _without_views(product: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What the linear takes the place of, and its input: (view(product(view(x0))), x0) where the views only fold the leading
    dimensions of x0 for the product and unfold them again (Conv1D), so that adapters beside it read the same x0."""
    users = list(product.users)
    if len(users) != 1 or not is_call(x, *_VIEWS) or not is_call(users[0], *_VIEWS) or users[0].args[0] is not product:
        return product, x
    shapes: list[Any] = [getattr(value(n), "shape", ()) for n in (x.args[0], x, product, users[0])]
    if not all(shapes):
        return product, x
    before, folded, multiplied, after = shapes
    same = len(folded) == 2 and before[:-1] == after[:-1] and before[-1] == folded[-1] and multiplied[-1] == after[-1]
    return (users[0], x.args[0]) if same else (product, x)  # type: ignore[return-value]


def is_weight(node: Any, ctx: PassContext) -> bool:
    """A 2-D parameter, or a 2-D expression whose only inputs are parameters and state (`densify(W) + B @ A`)."""
    if not isinstance(node, fx.Node) or rank_of(node) != 2:
        return False
    return _is_parameter(node, ctx) if node.op == "placeholder" else _only_params(node, ctx, depth=24)


def _is_parameter(node: fx.Node, ctx: PassContext) -> bool:
    """A placeholder for a parameter of the model: one that passes may change, or an adapter (a retrace has those)."""
    return ctx.param(node) is not None or isinstance(value(node), torch.nn.Parameter)


def _only_params(node: fx.Node, ctx: PassContext, depth: int) -> bool:
    if node.op == "placeholder":
        return _is_parameter(node, ctx) or node.name in ctx.state or rank_of(node) == 0
    if depth == 0 or node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    return all(_only_params(source, ctx, depth - 1) for source in node.all_input_nodes)
