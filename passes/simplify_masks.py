"""A causal mask that is computed -> the flag that says the same: no [L, S] mask is made, read and kept for backward.

    scaled_dot_product_attention(q, k, v, attn_mask=arange(S) <= arange(L)[:, None])
        ->  scaled_dot_product_attention(q, k, v, is_causal=True)

transformers computes such masks for every traced model (`mask_terms`). At 16,384 tokens one is 268 MB for each row of the
batch, and torch's flash kernels on GPUs take no mask. One that says more (padding) stays here; `lower_attention` splits it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx

from ..attention_ops import SDPA_NAMES
from ..fx_utils import is_call, value
from ..pass_manager import PassContext
from .mask_terms import MaskReader, Terms, same_size


def simplify_masks(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of attentions that lost their mask."""
    reader, count = MaskReader(gm.graph), 0
    for node in gm.graph.nodes:
        if not is_call(node, F.scaled_dot_product_attention):
            continue
        given = dict(zip(SDPA_NAMES, node.args)) | node.kwargs
        terms = causal_terms(reader, given["query"], given["key"], given.get("attn_mask"))
        if terms is None or terms.rest or given.get("is_causal", False):
            continue
        node.args = tuple(given.pop(name) for name in SDPA_NAMES[:3])
        given.pop("attn_mask")
        node.kwargs = given | {"is_causal": terms.causal}
        count += 1
    return count


def causal_terms(reader: MaskReader, query: fx.Node, key: fx.Node, mask: fx.Node | None) -> Terms | None:
    """What a mask says, where it has a row for each query and a column for each key; None where nothing is known."""
    kind, q, k = (value(node) for node in (mask, query, key))
    if not all(isinstance(t, Tensor) and t.dim() >= 2 for t in (kind, q, k)):
        return None
    terms = reader.terms(mask)
    whole = same_size(kind.shape[-2], q.shape[-2]) and same_size(kind.shape[-1], k.shape[-2])
    return terms if terms.rest != (mask,) and (whole or not terms.causal) else None
