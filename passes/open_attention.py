"""nn.MultiheadAttention's one call -> the linears that it makes of its weights, around `attend`.

    multi_head_attention_forward(x, x, x, E, heads, W [3E, E], b, ..., Wo, bo)
        ->  q, k, v = linear(x, W, b).chunk(3, -1);  linear(attend(q, k, v, heads, ...)[0], Wo, bo)

Where queries, keys and values are not the same tensor, a packed W makes one linear for each and a part of its output is
used: all of W stays one 4-bit weight with one adapter, for products that are up to three times as large as needed.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..attention import attend
from ..fx_utils import LINEAR, emit_valued, is_call, peel_casts, value
from ..pass_manager import PassContext

_OPAQUE = F.multi_head_attention_forward
_SIGNATURE = inspect.signature(_OPAQUE)


def open_attention(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of calls taken apart."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_call(node, _OPAQUE):
            continue
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not any(_is_ours(given[name], ctx) for name in ("in_proj_weight", "q_proj_weight", "out_proj_weight")):
            continue
        reason = _decline_reason(given)
        if reason is not None:
            weight = given["q_proj_weight"] if given["use_separate_proj_weight"] else given["in_proj_weight"]
            entry = ctx.param(weight)
            ctx.decline(entry.name if entry else node.name, reason)
            continue
        _open(node, given)
        count += 1
    return count


def _is_ours(weight: Any, ctx: PassContext) -> bool:
    """A target, or a weight that has been adapted: it is read as an expression then."""
    entry = ctx.param(weight)
    if entry is not None:
        return entry.site is not None or ctx.edits.decline_reason(entry) is None
    return isinstance(weight, fx.Node) and peel_casts(weight).op != "placeholder"


def _decline_reason(given: dict[str, Any]) -> str | None:
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return "its attention adds keys and values of its own"
    if any(not isinstance(value(given[name]), torch.Tensor) or value(given[name]).dim() != 3 for name in _INPUTS):
        return "its attention has no batch"
    return None


_INPUTS = ("query", "key", "value")


def _open(node: fx.Node, given: dict[str, Any]) -> None:
    parts = _separate(node, given) if given["use_separate_proj_weight"] else _packed(node, given)
    core = (
        *parts,
        given["num_heads"],
        given["dropout_p"] if given["training"] else 0.0,
        *(
            given[name]
            for name in ("key_padding_mask", "attn_mask", "is_causal", "need_weights", "average_attn_weights")
        ),
    )
    attended = _emit(node, attend, *core)
    context = _emit(node, operator.getitem, attended, 0)
    results = [_emit(node, LINEAR, context, given["out_proj_weight"], given["out_proj_bias"])]
    if given["need_weights"]:
        results.append(_emit(node, operator.getitem, attended, 1))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _separate(node: fx.Node, given: dict[str, Any]) -> list[fx.Node]:
    """Three weights [E, E], [E, kdim], [E, vdim]; one bias of 3E."""
    width, bias = given["embed_dim_to_check"], given["in_proj_bias"]
    parts = []
    for index, name in enumerate(_INPUTS):
        own = None if bias is None else _emit(node, operator.getitem, bias, _rows(index, width))
        parts.append(_emit(node, LINEAR, given[name], given[f"{name[0]}_proj_weight"], own))
    return parts


def _packed(node: fx.Node, given: dict[str, Any]) -> list[fx.Node]:
    """One weight [3E, E]: one linear for each different input, and of its output what that input is projected to."""
    width, linears = given["embed_dim_to_check"], dict[fx.Node, fx.Node]()
    parts = []
    for index, name in enumerate(_INPUTS):
        x = given[name]
        if x not in linears:
            linears[x] = _emit(node, LINEAR, x, given["in_proj_weight"], given["in_proj_bias"])
        parts.append(_emit(node, operator.getitem, linears[x], (..., _rows(index, width))))
    return parts


def _rows(index: int, width: int) -> slice:
    return slice(index * width, (index + 1) * width)


def _emit(node: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call before `node`, with the value that it has for the example inputs: later passes ask for shapes and dtypes."""
    return emit_valued(node, target, args, node)
