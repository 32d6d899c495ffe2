"""Attention -> an op with the kernel that the table chose, where that is not the library's.

    scaled_dot_product_attention(q, k, v)  ->  qlora.attention(q, k, v, mask, causal, scale, "flash")[0]

Key heads that were repeated for groups of query heads (`k[:, :, None].expand(...).reshape(...)`, `repeat_interleave`, or
`enable_gqa`) are read as they were before: no copy in memory, and their gradients come out summed over the group.
A mask that is causal and hides keys besides (padding) is split into the flag and one row of keys.
`kernels={"attention": "library"}` switches the rewrite off.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .. import attention_ops
from ..attention_ops import SDPA_NAMES
from ..fx_utils import emit, emit_valued, hint, is_call, replace, value
from ..pass_manager import PassContext
from .mask_terms import MaskReader, same_size
from .simplify_masks import causal_terms

_WHOLE = slice(None)


def lower_attention(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of attentions rewritten."""
    reader, count = MaskReader(gm.graph), 0
    for node in list(gm.graph.nodes):
        if is_call(node, F.scaled_dot_product_attention) and isinstance(value(node), Tensor):
            count += _lower(node, ctx, reader)
    return count


def _lower(node: fx.Node, ctx: PassContext, reader: MaskReader) -> int:
    given = dict(zip(SDPA_NAMES, node.args)) | node.kwargs
    reason = _decline(given)
    if reason is not None:
        ctx.decline(node.name, f"attention stays as it is: {reason}")
        return 0
    q, k, v = (given[name] for name in SDPA_NAMES[:3])
    queries, size = (hint(s) for s in value(q).shape[2:])
    keys, kind = hint(value(k).shape[2]), value(node)
    choice = ctx.choose("attention", rows=queries, n=(keys,), k=size, dtype=kind.dtype, device=kind.device.type)
    if choice is None:
        return 0
    node.meta["qlora_kernels"] = (("attention", choice),)
    if choice.name == "library":
        return 0
    shared_k, shared_v = _before_repeat(k), _before_repeat(v)
    if value(shared_k).shape[:2] == value(shared_v).shape[:2]:
        k, v = shared_k, shared_v
    scale = given.get("scale")
    mask, causal = _split(node, given, reader)
    numbers = causal, 1 / math.sqrt(size) if scale is None else scale, choice.name
    new = emit(node, torch.ops.qlora.attention.default, (q, k, v, mask, *numbers), node)
    replace(node, emit(node, operator.getitem, (new, 0), node))
    return 1


def _split(node: fx.Node, given: dict[str, Any], reader: MaskReader) -> tuple[Any, bool]:
    """(mask, causal): a mask that says "causal, and these keys" as the flag and a mask of one row for all queries."""
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    terms = None if causal else causal_terms(reader, given["query"], given["key"], mask)
    if terms is None or not terms.causal or not terms.rest or not all(_is_of_keys(term) for term in terms.rest):
        return mask, causal
    first, *others = terms.rest
    for other in others:
        first = emit_valued(node, operator.and_, (first, other), node)
    return first, True


def _is_of_keys(term: fx.Node) -> bool:
    """Whether the term is the same for all queries."""
    shape = value(term).shape
    return 2 <= len(shape) <= 4 and same_size(shape[-2], 1)


def _decline(given: dict[str, Any]) -> str | None:
    return attention_ops.why_not(**given | {name: value(given.get(name)) for name in SDPA_NAMES[:4]})


def _before_repeat(node: fx.Node) -> fx.Node:
    """k [B, KV, S, D] for a node that repeats each of its heads, [B, KV n, S, D]; else the node itself."""
    source: Any = None
    if is_call(node, "repeat_interleave", torch.repeat_interleave):
        arguments = dict(zip(("input", "repeats", "dim"), node.args)) | node.kwargs
        if isinstance(arguments.get("repeats"), int) and arguments.get("dim") in (1, -3):
            source = node.args[0]
    elif is_call(node, "reshape", torch.reshape) and is_call(node.args[0], "expand"):
        apart = node.args[0].args[0]  # type: ignore[union-attr]
        source = _without_axis(apart)
        if source is not None and not _repeats(value(source).shape, value(node.args[0]).shape, value(node).shape):
            source = None
    return source if isinstance(value(source), Tensor) and value(source).dim() == 4 else node


def _without_axis(node: Any) -> Any:
    """x for x[:, :, None], x[:, :, None, :, :] and x.unsqueeze(2); None for anything else."""
    if is_call(node, operator.getitem):
        index = node.args[1]
        if not isinstance(index, tuple) or len(index) not in (3, 5):
            return None
        new_axis = all(part is None if i == 2 else part == _WHOLE for i, part in enumerate(index))
        return node.args[0] if new_axis and value(node.args[0]).dim() == 4 else None
    if is_call(node, "unsqueeze", torch.unsqueeze) and node.args[1:] in ((2,), (-3,)):
        return node.args[0] if value(node.args[0]).dim() == 4 else None
    return None


def _repeats(shape: Any, expanded: Any, joined: Any) -> bool:
    """[B, KV, S, D] -> [B, KV, n, S, D] -> [B, KV n, S, D]"""
    b, kv, s, d = shape
    if len(expanded) != 5 or len(joined) != 4 or (expanded[0], expanded[1], *expanded[3:]) != (b, kv, s, d):
        return False
    return tuple(joined) == (b, kv * expanded[2], s, d)
