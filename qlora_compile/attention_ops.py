"""Attention as one op whose kernel was chosen: forward with the log-sum-exp of its scores, backward from that.

    attention: softmax(scale q kᵀ + mask) v

B batch, H query heads, KV key heads (query head h reads key head h // (H / KV)), L queries, S keys, D size of a query and
key, E of a value. `lower_attention` puts the op into a graph. Its plain-torch body computes in fp32, a bounded number of
scores at a time, and rounds each result once: the meaning, and what the kernel "fp32" is. "flash" and "flash_fp32" are the
generated C++, with products in bf16 and in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .derivatives import once_differentiable
from .lora_group import contiguous_rows, kernel_for
from .ops import define_op

SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # the first of its arguments
SCORES = 1 << 21  # attention scores at a time (8 MiB): whole heads, or a part of the queries
FLASH, FLASH_FP32 = "flash", "flash_fp32"
_GENERATED = {  # kernel -> what its two functions' names begin with, and the dtypes that they read
    FLASH: ("attention", (torch.bfloat16,)),
    FLASH_FP32: ("wide_attention", (torch.float32, torch.bfloat16, torch.float16)),
}


def why_not(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why the op does not compute this `F.scaled_dot_product_attention`, in a few words, or None."""
    tensors = query, key, value
    if any(not isinstance(t, Tensor) or t.dim() != 4 for t in tensors):
        return "it has not four dimensions"
    if dropout_p != 0.0:
        return "it drops out"
    (batch, heads), (k_batch, k_heads), v_sizes = (tuple(t.shape[:2]) for t in tensors)
    if batch != k_batch or (k_batch, k_heads) != v_sizes:
        return "queries, keys and values have different batches or heads"
    if heads != k_heads and not (enable_gqa and heads % k_heads == 0):
        return "queries and keys have different numbers of heads"
    if any(t.dtype != query.dtype for t in (key, value)):
        return "queries, keys and values have different dtypes"
    if not isinstance(scale, (int, float, type(None))):
        return "its scale is computed"
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() not in (2, 3, 4)):
        return "its mask trains or has other dimensions"
    return None


def _ranges(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _generated(kernel: str, direction: str, q: Tensor) -> Callable[..., None] | None:
    """The generated function "forward" or "backward", where it was chosen and this machine has it."""
    name, dtypes = _GENERATED.get(kernel, ("", ()))
    return kernel_for(f"{name}_{direction}", q.device) if q.dtype in dtypes else None


def _like_query(q: Tensor, size: int) -> Tensor:
    """[B, H, L, size], heads of one query side by side in memory: the transpose and reshape that follow copy nothing."""
    b, h, queries, _ = q.shape
    return q.new_empty((b, queries, h, size)).transpose(1, 2)


def _mask_of(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as [B, H, L, S] without a copy, except of one whose rows are not contiguous."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:-1], k.shape[2])
    return contiguous_rows(mask).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice, slice]]:
    """(batch index, key head, its query heads, queries) with at most SCORES scores, where one row of one head allows."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], max(k.shape[2], 1)
    rows = max(1, min(queries, SCORES // keys))
    together = max(1, min(group, SCORES // (rows * keys)))
    for index in range(q.shape[0]):
        for head in range(k.shape[1]):
            for heads in _ranges(group, together):
                for part in _ranges(queries, rows):
                    yield index, head, slice(head * group + heads.start, head * group + heads.stop), part


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal_from: int | None, scale: float) -> Tensor:
    """scale q kᵀ + mask in fp32 [H, L, S], for queries from `causal_from` on of a causal attention (None: not causal)."""
    scores = torch.matmul(q, k.t()).mul_(scale)
    if mask is not None:
        scores = scores.masked_fill_(mask.logical_not(), -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    if causal_from is not None:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(causal_from + 1)
        scores.masked_fill_(hidden, -math.inf)
    return scores


@define_op
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    """q [B, H, L, D], k [B, KV, S, D], v [B, KV, S, E], mask (bool or added) -> (out [B, H, L, E], log-sum-exp [B, H, L]).

    A query that sees no key gets zeros. `kernel` is a name of `runtime.kernels.dispatch`.
    """
    out = _like_query(q, v.shape[-1])
    logsumexp = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    mask = _mask_of(mask, q, k)
    by_blocks = _generated(kernel, "forward", q)
    if by_blocks is not None:
        by_blocks(contiguous_rows(q), contiguous_rows(k), contiguous_rows(v), mask, causal, scale, out, logsumexp)
        return out, logsumexp
    if k.shape[2] == 0:
        return out.zero_(), logsumexp.fill_(-math.inf)
    for b, head, h, rows in _blocks(q, k):
        part = None if mask is None else mask[b, h, rows]
        scores = _scores(q[b, h, rows].float(), k[b, head].float(), part, rows.start if causal else None, scale)
        most = scores.amax(-1, keepdim=True)
        most.masked_fill_(most == -math.inf, 0)
        total = scores.sub_(most).exp_().sum(-1, keepdim=True)
        out[b, h, rows] = torch.matmul(scores, v[b, head].float()).div_(total.masked_fill(total == 0, 1))
        logsumexp[b, h, rows] = (most + total.log()).squeeze(-1)
    return out, logsumexp


@torch.library.register_fake("qlora::attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    return _like_query(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@define_op
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor | None, causal: bool,
    scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> (dq, dk, dv); the probabilities are computed again from the log-sum-exp (Dao et al., arXiv 2205.14135)."""
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    mask = _mask_of(mask, q, k)
    by_blocks = _generated(kernel, "backward", q)
    if by_blocks is not None and all(t.stride(-1) == 1 or t.shape[-1] <= 1 for t in (dq, dk, dv)):
        q, k, v = contiguous_rows(q), contiguous_rows(k), contiguous_rows(v)
        by_blocks(contiguous_rows(dout), q, k, v, contiguous_rows(out), logsumexp, mask, causal, scale, dq, dk, dv)
        return dq, dk, dv
    wide_dk, wide_dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (k, v))
    for b, head, h, rows in _blocks(q, k):
        part = None if mask is None else mask[b, h, rows]
        qs, ks, vs, dos = (t.float() for t in (q[b, h, rows], k[b, head], v[b, head], dout[b, h, rows]))
        p = _scores(qs, ks, part, rows.start if causal else None, scale)
        p.sub_(logsumexp[b, h, rows].clamp_min(-1e30).unsqueeze(-1)).exp_()
        wide_dv[b, head] += torch.bmm(p.transpose(1, 2), dos).sum(0)
        delta = (dos * out[b, h, rows]).sum(-1, keepdim=True)
        ds = torch.matmul(dos, vs.t()).sub_(delta).mul_(p).mul_(scale)
        dq[b, h, rows] = torch.matmul(ds, ks)
        wide_dk[b, head] += torch.bmm(ds.transpose(1, 2), qs).sum(0)
    return dq, dk.copy_(wide_dk), dv.copy_(wide_dv)


@torch.library.register_fake("qlora::attention_backward")
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor | None, causal: bool,
    scale: float, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output, mask)
    ctx.mark_non_differentiable(output[1])


@once_differentiable("qlora::attention")
def _backward(ctx: Any, saved: Sequence[Tensor], dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, mask = saved
    grads = torch.ops.qlora.attention_backward(dout, *tensors, mask, ctx.causal, ctx.scale, ctx.kernel)
    return (*grads, None, None, None, None)


torch.library.register_autograd("qlora::attention", _backward, setup_context=_setup_context)
