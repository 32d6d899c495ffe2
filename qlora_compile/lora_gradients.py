"""The arithmetic of `qlora::lora_linear_backward`: dx of a group as one product, dA and dB, by kernels where there are any.

Shapes as in `ops.py`: M tokens, N output features, K input features, R the rank of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lora_group import LoRAGroup, scratch, split_ranks


def backward(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """[dy_i [M, N_i]] -> (dx [M, K] if it is needed, [dA_j], [dB_j]), with the library's GEMM in the compute dtype."""
    parts = split_ranks(group, h)
    kernel = group.low_rank_kernel("lora_backward", x)
    if kernel is not None:
        low, da, db = low_rank_grads(kernel, group, dys, x, parts, need_adapters)
    else:
        low, da, db = low_rank_grads_reference(group, dys, x, parts, need_adapters)
    return grad_x(group, dys, low, x) if need_dx else None, da, db


_LowRankGrads = tuple[list[Tensor], list[Tensor], list[Tensor]]  # g_j [M, R], dA_j, dB_j; the last two may be absent


def low_rank_grads(
    kernel: Callable[..., Any], group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Sequence[Tensor], need_adapters: bool
) -> _LowRankGrads:
    """One call of the kernel `lora_backward` for each adapter."""
    low = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in h]
    da = [torch.empty_like(a) for a in group.lora_a] if need_adapters else []
    db = [torch.empty_like(b) for b in group.lora_b] if need_adapters else []
    for i, mine in enumerate(group.adapters_of()):
        for j in mine:
            grads = (da[j], db[j]) if need_adapters else (None, None)
            kernel(dys[i], x, h[j], group.lora_b[j], group.factor(j), low[j], *grads)
    return low, da, db


def low_rank_grads_reference(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Sequence[Tensor], need_adapters: bool
) -> _LowRankGrads:
    low, db = [], []
    for i, mine in enumerate(group.adapters_of()):
        for j in mine:
            factor = group.factor(j)
            low.append((dys[i] @ group.lora_b[j].to(group.dtype)).mul_(factor))
            if need_adapters:
                db.append((dys[i].t() @ h[j]).to(group.lora_b[j].dtype).mul_(factor))
    return low, grad_a(group, x, low) if need_adapters else [], db


def grad_a(group: LoRAGroup, x: Tensor, low: list[Tensor]) -> list[Tensor]:
    """g_jᵀ dropout_j(x) [R, K] for each adapter; one product for all of them where nothing drops."""
    if not low:
        return []
    if not group.dropout:
        left = low[0] if len(low) == 1 else torch.cat(low, dim=1)
        rows = (left.t() @ x).split(group.ranks())
        return [row.to(a.dtype, copy=True) for row, a in zip(rows, group.lora_a, strict=True)]
    return [(g.t() @ (x * group.mask(j, x))).to(group.lora_a[j].dtype) for j, g in enumerate(low)]


def grad_x(group: LoRAGroup, dys: list[Tensor], low: list[Tensor], x: Tensor) -> Tensor:
    """[dy_0 ... g_0 ...] [W_0; ...; A_0; ...]: one product [M, sum N + sum R] x [sum N + sum R, K] for the group."""
    k = x.shape[-1]
    one_product = low if not group.dropout else []
    rows = sum(group.out_features) + sum(g.shape[1] for g in one_product)
    stacked = scratch("stacked", (rows, k), x, group.dtype)
    first = 0
    for i, n in enumerate(group.out_features):
        group.dense_weight(i, k, out=stacked[first : first + n])
        first += n
    for a in group.lora_a if one_product else ():
        stacked[first : first + a.shape[0]].copy_(a)
        first += a.shape[0]
    left = [*dys, *one_product]
    dx = (torch.cat(left, dim=1) if len(left) > 1 else left[0]) @ stacked
    if group.dropout:
        for j, g in enumerate(low):
            dx += (g @ group.lora_a[j].to(group.dtype)) * group.mask(j, x)
    return dx
