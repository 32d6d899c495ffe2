"""Linears with adapters as others write them -> a plain linear, with the adapters as branches beside it.

    linear(x, (densify(W) + (B @ A) * alpha * weight).to(dtype))  ->  linear(x, W) + linear(linear(x, A), B) * alpha * weight

That form is how a parameter used by another module's own code reads after `prepare` (`modules._adapted_weight`).
bitsandbytes' product becomes a linear over dequantized codes (`bnb_products`). PEFT writes branches beside the product
by itself (`lora_pattern` reads them through its casts); its other kinds of adapter (DoRA, biases) stay as traced, and
are named here.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..foreign import expected_adapters, special_adapter
from ..fx_utils import ADD, dtype_of, emit_valued, is_call, is_linear, peel_casts, peel_transposes
from ..pass_manager import PassContext
from .bnb_products import rewrite_products
from .lora_pattern import Branch, cast, find_branches, read_scales, write_branch

_MATMUL = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")


def match_lora(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of products and linears rewritten."""
    count = rewrite_products(gm, ctx)
    if ctx.graph_number == 0:  # also those that no graph will have: their code breaks it
        for name, layer in ctx.edits.peft_layers.items():
            if reason := special_adapter(layer):
                ctx.decline(name, reason)
    for node in list(gm.graph.nodes):
        if not is_linear(node):
            continue
        _check_peft(node, ctx)
        expression, odd = peel_transposes(node.args[1])
        found = _read_adapted(expression, odd)
        if found is None:
            continue
        weight, branches = found
        _rewrite(node, weight, odd, branches)
        count += 1
    return count


def _check_peft(node: fx.Node, ctx: PassContext) -> None:
    """Record a layer that PEFT adapted with plain adapters, where the passes find others beside the product."""
    name = _site(node, ctx)
    layer = ctx.edits.peft_layers.get(name)
    if layer is None or len(find_branches(node)[1]) == len(expected_adapters(layer)) or special_adapter(layer):
        return
    ctx.decline(name, "its adapters were not found beside its product, and run as traced")


def _site(node: fx.Node, ctx: PassContext) -> str:
    """The name of the linear's weight, "" where it has none."""
    entry = ctx.param(peel_transposes(node.args[1])[0])
    return entry.name if entry else next(iter(node.meta.get("qlora_sites", ())), "")


def _rewrite(node: fx.Node, weight: fx.Node, odd: bool, branches: list[Branch]) -> None:
    new = emit_valued(node, "t", (weight,), node, method=True) if odd else weight
    node.args = (node.args[0], new, node.args[2])
    x, y = node.args[0], node
    dtype = dtype_of(x) or torch.float32
    for branch in branches:
        alpha, weights, factors = branch.scales
        a, b = (cast(node, n, dtype, node) for n in (branch.a, branch.b))
        y = write_branch(y, x, a, b, [alpha, *weights, *factors], 0.0, dtype)


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
    node, scales = scaled
    if not is_call(node, *_MATMUL) or len(scales.weights) != 1:
        return None
    b, a = (peel_casts(n) for n in node.args)
    return Branch(a, b, scales)
