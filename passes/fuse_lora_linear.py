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

from ..fx_utils import dtype_of, emit, is_call, is_linear, peel_casts, peel_transposes, replace
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
        reason = _decline_reason(node, branches)
        if reason is not None:
            ctx.decline(_site(node), reason)
            continue
        _fuse(node, last, branches, quantized, ctx)
        count += 1
    return count


def _site(node: fx.Node) -> str:
    return (node.meta.get("qlora_sites") or (node.name,))[0]


def _decline_reason(node: fx.Node, branches: list[Branch]) -> str | None:
    if dtype_of(peel_casts(node.args[0])) not in _FLOATS:
        return f"its input is {dtype_of(peel_casts(node.args[0]))}"
    if len({branch.dropout for branch in branches}) > 1:
        return "its adapters drop with different probabilities"
    if any(len(branch.weights) > 1 for branch in branches):
        return "an adapter is scaled by more than one tensor"
    if len({bool(branch.weights) for branch in branches}) > 1:
        return "only some of its adapters are scaled by a tensor"
    return None


def _fuse(node: fx.Node, last: fx.Node, branches: list[Branch], quantized: bool, ctx: PassContext) -> None:
    given, weight, bias = node.args
    x = peel_casts(given)
    dtype = dtype_of(given) or ctx.config.compute_dtype
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
        [w for branch in branches for w in branch.weights],
        [branch.alpha for branch in branches],
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
    fused.meta["qlora_sites"] = node.meta.get("qlora_sites") or _sites_of(weight, ctx)
    out.meta["example_value"] = node.meta.get("example_value")
    if dtype_of(x) != dtype:
        out = cast(out.next, _as(out, dtype_of(x)), dtype, node)
    replace(last, out)


def _as(node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    example = node.meta.get("example_value")
    if isinstance(example, torch.Tensor) and dtype is not None:
        node.meta["example_value"] = example.to(dtype)
    return node


def _sites_of(weight: fx.Node, ctx: PassContext) -> tuple[str, ...]:
    entry = ctx.param(peel_transposes(weight)[0])
    return (entry.name,) if entry else ()


def _seed(before: fx.Node, like: fx.Node) -> fx.Node:
    """A fresh 0-dim int64 seed per call: the backward draws the same mask from it, so no mask is stored."""
    node = emit(before, torch.randint, (0, 2**62, ()), like)
    node.kwargs = {"dtype": torch.int64, "device": "cpu"}
    return node
