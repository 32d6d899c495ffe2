"""bitsandbytes' 4-bit product -> the codes and scales dequantized where the product needs them.

    gemm_4bit(x, W, [N, K], ...)  ->  linear(x, dequantize_4bit(W, absmax, scale, offset, [N, K], ...), b)

The codes and scales are those that the model holds, in the order that our ops read: nothing is copied. A weight that
bitsandbytes has repacked for AVX-512 is the exception: the compiled graph gets an unpacked copy of it. Called by
`match_lora`.
"""

from __future__ import annotations

import torch
from torch import fx

from ..foreign import bnb_decline_reason, is_bnb_weight, is_repacked, unpack
from ..fx_utils import LINEAR, dtype_of, emit, emit_valued, replace, value
from ..param_info import ParamInfo, StateRef
from ..pass_manager import PassContext
from .bnb_pattern import BnbProduct, read_product
from .lora_pattern import cast

_REPACKS = "bitsandbytes repacks its weight during this very call: the next one is traced again"


def rewrite_products(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of products rewritten."""
    count = 0
    for node in list(gm.graph.nodes):
        product = read_product(node, gm)
        if product is None:
            continue
        entry = ctx.param(product.weight)
        reason = _decline_reason(product, entry)
        if entry is None or reason is not None:
            ctx.decline(entry.name if entry else node.name, str(reason))
            continue
        _rewrite(product, entry, ctx)
        count += 1
    return count


def _decline_reason(product: BnbProduct, entry: ParamInfo | None) -> str | None:
    if entry is None or not is_bnb_weight(entry.param):
        return "its weight is no 4-bit parameter of the model"
    if product.repacked != is_repacked(entry.param):
        return _REPACKS
    return bnb_decline_reason(entry.param)


def _rewrite(product: BnbProduct, entry: ParamInfo, ctx: PassContext) -> None:
    node, weight = product.result, entry.param
    state = weight.quant_state  # type: ignore[attr-defined]
    dtype = dtype_of(product.x) or ctx.config.compute_dtype
    parts = _copied(product, entry, ctx) if product.repacked else _shared(product)
    args = (*parts, list(state.shape), state.quant_type, state.blocksize, dtype)
    dense = emit(node, torch.ops.qlora.dequantize_4bit.default, args, node)
    dense.meta["example_value"] = torch.empty(tuple(state.shape), dtype=dtype, device="meta")
    bias = product.bias if product.bias is None else cast(node, product.bias, dtype, node)
    linear = emit(node, LINEAR, (product.x, dense, bias), node)
    linear.meta["qlora_sites"] = dense.meta["qlora_sites"] = (entry.name,)
    replace(node, linear)


def _shared(product: BnbProduct) -> tuple[fx.Node | None, ...]:
    """The graph's own inputs: flat codes and absmax, and absmax_scale and offset where the scales are codes."""
    codes = _flat(product.weight)
    if product.absmax_8bit is None:
        return codes, product.absmax, None, None
    return codes, product.absmax_8bit, product.absmax, product.absmax_offset


def _copied(product: BnbProduct, entry: ParamInfo, ctx: PassContext) -> tuple[fx.Node | None, ...]:
    copy = unpack(entry.param)
    graph = product.result.graph
    codes = ctx.add_state(graph, StateRef(f"{entry.name}.codes", copy.codes, lambda: copy.codes))
    absmax = ctx.add_state(graph, StateRef(f"{entry.name}.absmax", copy.absmax, lambda: copy.absmax))
    return codes, absmax, None, None


def _flat(weight: fx.Node) -> fx.Node:
    """[n / 2, 1] in the storage's dtype -> uint8 [n / 2], above everything else, so that products can move together."""
    before = next(node for node in weight.graph.nodes if node.op != "placeholder")
    example = value(weight)
    flat = weight
    if example.dtype != torch.uint8:
        flat = emit_valued(before, "view", (flat, torch.uint8), weight, method=True)
    return emit_valued(before, "view", (flat, -1), weight, method=True)
