"""torch's own attention modules: which of their parameters are weights of linears, and their middle part as a function.

`nn.MultiheadAttention` holds its input projections as raw parameters and hands them, with the output projection's, to one
function, `F.multi_head_attention_forward`. `passes/open_attention.py` takes that call apart into linears around `attend`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def is_attention_weight(module: nn.Module, key: str) -> bool:
    """A projection of nn.MultiheadAttention: no linear module, but the weight of a linear all the same."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return key == "weight"  # its output projection, which it reads and never calls
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return key in _PROJECTIONS and module.bias_k is None and not module.add_zero_attn


def forgo_fast_path(root: nn.Module) -> None:
    """Torch's inference path of an encoder layer reads `linear1.weight` and would pass adapters by: switch it off."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            linears = (module.linear1, module.linear2)
            if any("_qlora_info" in linear.__dict__ for linear in linears):
                module.activation_relu_or_gelu = 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    dropout: float,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q kᵀ / sqrt(d) + mask) v, as F.multi_head_attention_forward computes it between its projections.

    Projected query [T, B, E], key and value [S, B, E]; `key_padding_mask` [B, S] and `attn_mask` [T, S] or
    [B * heads, T, S], bool (True: hidden) or added. Returns [T, B, E], and with `need_weights` the weights: [B, T, S], or
    [B, heads, T, S] if they are not averaged.
    """
    length, batch, width = query.shape
    split = [x.reshape(x.shape[0], batch, heads, width // heads).permute(1, 2, 0, 3) for x in (query, key, value)]
    if is_causal and key_padding_mask is None and not need_weights:
        mask = None
    else:
        mask, is_causal = _mask(attn_mask, key_padding_mask, batch, heads, query.dtype), False
    if not need_weights:
        q, k, v = split
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return context.permute(2, 0, 1, 3).reshape(length, batch, width), None
    scores = (split[0] * math.sqrt(heads / width)) @ split[1].transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    context = (weights @ split[2]).permute(2, 0, 1, 3).reshape(length, batch, width)
    return context, weights.mean(dim=1) if average else weights


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one that is added to the scores, [B or 1, heads or 1, T or 1, S]."""
    if attn_mask is not None:
        attn_mask = _added(attn_mask, dtype)
        attn_mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.dim() == 3 else attn_mask[None, None]
    if key_padding_mask is None:
        return attn_mask
    padding = _added(key_padding_mask, dtype)[:, None, None]
    return padding if attn_mask is None else attn_mask + padding


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
