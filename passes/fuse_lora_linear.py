"""dequantize + linear + adapters -> one op.

    linear(x.to(c), dequantize_4bit(codes, ...), b) + Σ linear(linear(dropout(x), A), B) * alpha * weight
        ->  qlora.lora_linear(x, [codes], ..., [A...], [B...], [weight...], [alpha...])[0]

A dense weight with adapters is fused the same way, with `quant_type` "none". A quantized linear without adapters too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import (
    RECOMPUTE,
    dtype_of,
    emit,
    is_call,
    is_linear,
    peel_casts,
    peel_transposes,
    replace,
    under_cast,
    value,
    writes_between,
)
from ..pass_manager import PassContext
from .lora_pattern import Branch, cast, find_branches

_DEQUANTIZE = torch.ops.qlora.dequantize_4bit.default
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fuse_lora_linear(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of linears fused."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_linear(node):
            continue
        quantized = is_call(node.args[1], _DEQUANTIZE)
        last, branches = find_branches(node)
        if not quantized and not branches:
            continue
        reason = _decline_reason(node, branches, ctx)
        if branches and writes_between(node, last, None):
            reason = "something between it and its adapters may write into their input"
        if reason is not None:
            ctx.decline((_sites(node, ctx) or (node.name,))[0], reason)
            continue
        _fuse(node, last, branches, quantized, ctx)
        count += 1
    return count


def _sites(node: fx.Node, ctx: PassContext) -> tuple[str, ...]:
    known = node.meta.get("qlora_sites")
    entry = ctx.param(peel_transposes(node.args[1])[0])
    return known or ((entry.name,) if entry else ())


def _decline_reason(node: fx.Node, branches: list[Branch], ctx: PassContext) -> str | None:
    x, weight, _ = node.args
    if dtype_of(x) not in _FLOATS:
        return f"its input is {dtype_of(x)}"
    # the op has no gradient for these
    if not is_call(weight, _DEQUANTIZE) and not _is_frozen(weight, ctx):
        return "its weight trains or is computed"
    if not all(_is_frozen(scale, ctx) for branch in branches for scale in branch.scales.weights):
        return "an adapter is scaled by a tensor that trains or is computed"
    if len({branch.dropout for branch in branches}) > 1:
        return "its adapters drop with different probabilities"
    if any(len(branch.scales.weights) > 1 for branch in branches):
        return "an adapter is scaled by more than one tensor"
    return None


def _is_frozen(node: Any, ctx: PassContext) -> bool:
    """A parameter, buffer, state or other input of the graph (through casts and transposes) that will not train."""
    root = peel_transposes(peel_casts(node))[0]
    entry = ctx.param(root)
    trains = ctx.edits.trains(entry) if entry is not None else getattr(value(root), "requires_grad", False)
    return root.op == "placeholder" and not trains


def _fuse(node: fx.Node, last: fx.Node, branches: list[Branch], quantized: bool, ctx: PassContext) -> None:
    given, weight, bias = node.args
    dtype = dtype_of(node) or dtype_of(given) or ctx.config.compute_dtype  # autocast: not that of the input
    x = _uncast_input(given, last)
    inner_bias = under_cast(bias) if dtype_of(bias) == dtype else None
    bias = inner_bias if inner_bias is not None else bias  # the op casts it by itself
    if quantized:
        codes, absmax, scale, offset, shape, quant_type, block_size, dtype = weight.args
        tensors: list[Any] = [
            [codes],
            [absmax],
            [scale] if scale is not None else [],
            [offset] if scale is not None else [],
        ]
        out_features = int(shape[0])
    else:
        tensors, quant_type, block_size = [[weight], [], [], []], "none", 0
        out_features = int(weight.meta["example_value"].shape[0])
    dropout = branches[0].dropout if branches else 0.0
    before = last.next
    args = (
        x,
        *tensors,
        [bias] if bias is not None else [],
        [branch.a for branch in branches],
        [branch.b for branch in branches],
        _scaling(branches, before, node),
        [branch.scales.alpha for branch in branches],
        [len(branches)],
        [_seed(before, node) for _ in branches] if dropout else [],
        dropout,
        [out_features],
        quant_type,
        block_size,
        dtype,
    )
    fused = emit(before, torch.ops.qlora.lora_linear.default, args, node)
    out = emit(fused.next, operator.getitem, (fused, 0), node)
    fused.meta["qlora_sites"] = _sites(node, ctx)
    out.meta["example_value"] = node.meta.get("example_value")
    wanted = dtype_of(last) or dtype
    if dtype_of(x) != wanted:
        out = cast(out.next, _as(out, dtype_of(x)), wanted, node)
    replace(last, out)


def _scaling(branches: list[Branch], before: fx.Node, like: fx.Node) -> list[fx.Node]:
    """A 0-dim tensor for each adapter, or none if numbers alone scale them. A number that is an input goes into it."""
    if not any(branch.scales.weights or branch.scales.factors for branch in branches):
        return []
    found = []
    for branch in branches:
        _, weights, factors = branch.scales
        scale = weights[0] if weights else _one(before, branch.a, like)
        for factor in factors:
            example = value(scale)
            scale = emit(before, operator.mul, (scale, factor), like)
            scale.meta["example_value"] = example
        found.append(scale)
    return found


def _one(before: fx.Node, adapter: fx.Node, like: fx.Node) -> fx.Node:
    node = emit(before, torch.ones, ((),), like)
    node.kwargs = {"dtype": torch.float32, "device": value(adapter).device}
    node.meta["example_value"] = torch.empty((), dtype=torch.float32, device="meta")
    return node


def _as(node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    example = node.meta.get("example_value")
    if isinstance(example, torch.Tensor) and dtype is not None:
        node.meta["example_value"] = example.to(dtype)
    return node


def _uncast_input(given: fx.Node, last: fx.Node) -> fx.Node:
    """x for x.to(dtype) where the op's own casts, of x to dtype and of the result to x's dtype, give the same numbers.

    They do for a cast from fp32 (the result is exact in fp32) and where only a cast back to x's dtype uses the result.
    """
    x, dtype = given, dtype_of(given)
    while (inner := under_cast(x)) is not None:
        back = all(under_cast(user) is last and dtype_of(user) == dtype_of(inner) for user in last.users)
        exact = dtype_of(x) == dtype and (dtype_of(inner) == torch.float32 or back)
        if dtype_of(inner) != dtype_of(x) and not (exact and dtype_of(inner) in _FLOATS):
            break
        x = inner
    return x


def _seed(before: fx.Node, like: fx.Node) -> fx.Node:
    """A fresh 0-dim int64 seed per call: the backward draws the same mask from it, so no mask is stored."""
    node = emit(before, torch.randint, (0, 2**62, ()), like)
    for key in RECOMPUTE:  # drawn again it would be another one
        node.meta.pop(key, None)
    node.kwargs = {"dtype": torch.int64, "device": "cpu"}
    return node
