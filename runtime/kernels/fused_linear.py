"""`lora_linear` and its backward as sums of products by the generated fp32 GEMM: base product, low-rank terms, bias and the
one rounding in one call, straight from the codes and from x's and dy's own dtype. Nothing but h and g is made on the way.

M tokens, N output features, K input features, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...lora_group import LoRAGroup
from .cpu_common import DTYPES
from .cpu_gemm import Codes, Term, readable, wide_gemm


def lora_forward(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """x [M, K] -> ([y_i [M, N_i]], h [M, sum R]) in x's dtype."""
    m, k = x.shape
    low = _low_rank(group, x)
    parts = low.split(group.ranks(), dim=1) if group.lora_a else ()
    ys = []
    for i, mine in enumerate(group.adapters_of()):
        terms = [Term(x, _weight(group, i, k).t())]
        terms += [Term(parts[j], readable(group.lora_b[j]).t(), group.factor(j)) for j in mine]
        ys.append(x.new_empty((m, group.out_features[i])))
        wide_gemm(terms, ys[-1], readable(bias[i]) if bias else None)
    return ys, low.to(x.dtype)


def lora_backward(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """[dy_i [M, N_i]] -> (dx [M, K] in x's dtype, [dA_j], [dB_j] in the parameters' dtypes)."""
    m = len(x)
    low = torch.empty((m, sum(group.ranks())), dtype=torch.float32)
    g, parts = ([*t.split(group.ranks(), dim=1)] if group.lora_a else [] for t in (low, h))
    db = []
    for i, mine in enumerate(group.adapters_of()):
        for j in mine:
            b = group.lora_b[j]
            wide_gemm([Term(dys[i], readable(b), group.factor(j))], g[j])
            if need_adapters:
                grad = torch.empty(b.shape, dtype=b.dtype if b.dtype in DTYPES else torch.float32)
                wide_gemm([Term(parts[j].t(), dys[i], group.factor(j))], grad.t())
                db.append(grad.to(b.dtype))
    da = _grad_a(group, x, low, g) if need_adapters else []
    return _grad_x(group, dys, g, x) if need_dx else None, da, db


def _weight(group: LoRAGroup, index: int, k: int) -> Tensor | Codes:
    if group.quant_type == "none":
        return readable(group.weight[index])
    scale, offset = (group.absmax_scale[index], group.absmax_offset[index]) if group.absmax_scale else (None, None)
    numbers = group.out_features[index], k, group.quant_type, group.block_size
    return Codes(group.weight[index], group.absmax[index], scale, offset, *numbers)


def _dropped(group: LoRAGroup, j: int, x: Tensor) -> Tensor:
    """dropout_j(x) in fp32; the mask is drawn as for x's own dtype, so that every kernel drops the same elements."""
    return group.mask(j, x).float().mul_(x)  # into the mask, which is nobody else's; x may be fp32 already


def _low_rank(group: LoRAGroup, x: Tensor) -> Tensor:
    """dropout_j(x) A_jᵀ for all adapters side by side: [M, sum R] in fp32. One product where nothing drops."""
    low = torch.empty((len(x), sum(group.ranks())), dtype=torch.float32)
    if not group.dropout and group.lora_a:
        wide_gemm([Term(x, readable(group.a_cat(torch.float32)).t())], low)
        return low
    for j, part in enumerate(low.split(group.ranks(), dim=1) if group.lora_a else ()):
        wide_gemm([Term(_dropped(group, j, x), readable(group.lora_a[j]).t())], part)
    return low


def _grad_a(group: LoRAGroup, x: Tensor, low: Tensor, g: list[Tensor]) -> list[Tensor]:
    """g_jᵀ dropout_j(x) [R, K] for each adapter; one product for all of them where nothing drops."""
    out = torch.empty((low.shape[1], x.shape[1]), dtype=torch.float32)
    rows = out.split(group.ranks()) if g else ()
    if not group.dropout and g:
        wide_gemm([Term(low.t(), x)], out)
    for j, row in enumerate(rows if group.dropout else ()):
        wide_gemm([Term(g[j].t(), _dropped(group, j, x))], row)
    return [row.to(a.dtype, copy=len(rows) > 1) for row, a in zip(rows, group.lora_a, strict=True)]


def _grad_x(group: LoRAGroup, dys: list[Tensor], g: list[Tensor], x: Tensor) -> Tensor:
    """sum_i dy_i W_i + sum_j g_j A_j: one product for the group."""
    k = x.shape[1]
    terms = [Term(dy, _weight(group, i, k)) for i, dy in enumerate(dys)]
    if not group.dropout:
        terms += [Term(low, readable(a)) for low, a in zip(g, group.lora_a, strict=True)]
    dx = torch.empty(x.shape, dtype=torch.float32 if group.dropout else x.dtype)
    wide_gemm(terms, dx)
    if group.dropout:
        for j, a in enumerate(group.lora_a):
            dx += (g[j] @ a.float()) * group.mask(j, x)
    return dx.to(x.dtype)
