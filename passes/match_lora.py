"""A weight with its adapters already added -> the plain weight, with the adapters as branches beside the product.

    linear(x, (densify(W) + (B @ A) * alpha * weight).to(dtype))  ->  linear(x, W) + linear(linear(x, A), B) * alpha * weight

That form is how a parameter used by another module's own code reads after `prepare` (`modules._adapted_weight`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import ADD, dtype_of, emit, is_call, is_linear, peel_casts, peel_transposes
from ..pass_manager import PassContext
from .lora_pattern import Branch, cast, read_scales, write_branch

_MATMUL = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")


def match_lora(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Take the adapters out of adapted weights; returns the number of linears rewritten."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_linear(node):
            continue
        expression, odd = peel_transposes(node.args[1])
        found = _read_adapted(expression, odd)
        if found is None:
            continue
        weight, branches = found
        _rewrite(node, weight, odd, branches)
        count += 1
    return count


def _rewrite(node: fx.Node, weight: fx.Node, odd: bool, branches: list[Branch]) -> None:
    new = emit(node, "t", (weight,), node, method=True) if odd else weight
    if odd:
        new.meta["example_value"] = weight.meta["example_value"].t()
    node.args = (node.args[0], new, node.args[2])
    x, y = node.args[0], node
    dtype = dtype_of(x) or torch.float32
    for branch in branches:
        a, b = (cast(node, n, dtype, node) for n in (branch.a, branch.b))
        y = write_branch(y, x, a, b, branch.alpha, branch.weights[0], 0.0, dtype)


def _read_adapted(node: Any, odd: bool) -> tuple[fx.Node, list[Branch]] | None:
    """densify(W) + Σ (B @ A)[.t()] * alpha * weight -> (W, branches), or None if this is something else.

    `odd`: the linear reads it transposed. A weight used the other way round than its adapter was made for stays dense.
    """
    branches: list[Branch] = []
    node = peel_casts(node)
    while is_call(node, *ADD, "add"):
        branch = _read_delta(node.args[1], odd)
        if branch is None:
            return None
        branches.insert(0, branch)
        node = peel_casts(node.args[0])
    if not is_call(node, torch.ops.qlora.densify, torch.ops.qlora.densify.default):
        return None
    return node.args[0], branches


def _read_delta(node: Any, odd: bool) -> Branch | None:
    node, transposed = peel_transposes(node)
    if transposed != odd:
        return None
    scaled = read_scales(node)
    if scaled is None:
        return None
    node, alpha, weights = scaled
    if not is_call(node, *_MATMUL) or len(weights) != 1:
        return None
    b, a = (peel_casts(n) for n in node.args)
    return Branch(a, b, alpha, weights)
