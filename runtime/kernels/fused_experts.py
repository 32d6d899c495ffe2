"""`grouped_lora_linear` and its backward by the generated fp32 GEMM: for each expert one sum of products straight from its
codes, as `fused_linear.py` has it for a linear.

S rows (token-expert pairs) sorted by expert, N output and K input features, R the rank of one adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...expert_products import ExpertGroup, scaled
from .cpu_gemm import Codes, Term, readable, wide_gemm


def grouped_forward(group: ExpertGroup, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, K] -> (y [S, N], h [S, sum R]) in x's dtype; rows of no expert are zero."""
    columns = group.columns()
    y = x.new_zeros((x.shape[0], group.shape[0]))
    h = x.new_zeros((x.shape[0], sum(a.shape[1] for a in group.lora_a)))
    for expert, rows in group.runs():
        mine = x[rows]
        low = torch.empty((len(mine), h.shape[1]), dtype=torch.float32)
        terms = [Term(mine, _weight(group, expert).t())]
        for a, b, factor, own in zip(group.lora_a, group.lora_b, group.factors, columns, strict=True):
            wide_gemm([Term(mine, readable(a[expert]).t())], low[:, own])
            terms.append(Term(scaled(low[:, own], factor, rows), readable(b[expert]).t()))
        h[rows] = low
        wide_gemm(terms, y[rows])
    return y, h


def grouped_backward(
    group: ExpertGroup, dy: Tensor, x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dy [S, N] -> (dx [S, K] if it is needed, [dA_j], [dB_j]); an expert without rows has gradient zero."""
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_dx else None
    da = [torch.zeros(a.shape, dtype=a.dtype) for a in group.lora_a] if need_adapters else []
    db = [torch.zeros(b.shape, dtype=b.dtype) for b in group.lora_b] if need_adapters else []
    for expert, rows in group.runs():
        terms = [Term(dy[rows], _weight(group, expert))]
        for j, (factor, own) in enumerate(zip(group.factors, group.columns(), strict=True)):
            low = torch.empty((rows.stop - rows.start, own.stop - own.start), dtype=torch.float32)
            wide_gemm([Term(dy[rows], readable(group.lora_b[j][expert]))], low)
            low = scaled(low, factor, rows)
            if need_adapters:
                wide_gemm([Term(low.t(), x[rows])], da[j][expert])
                wide_gemm([Term(scaled(h[rows, own].float(), factor, rows).t(), dy[rows])], db[j][expert].t())
            terms.append(Term(low, readable(group.lora_a[j][expert])))
        if dx is not None:
            wide_gemm(terms, dx[rows])
    return dx, da, db


def _weight(group: ExpertGroup, expert: int) -> Tensor | Codes:
    """The expert's matrix [N, K]: its codes, where each row of what is stored is whole blocks; else decoded."""
    n, k = group.shape
    rows, columns = (k, n) if group.transposed else (n, k)
    if group.quant_type == "none" or columns % group.block_size:
        return readable(group.dense(expert))
    absmax, *double = (part[expert] for part in group.scales)
    scale, offset = double or (None, None)
    stored = Codes(group.weight[expert], absmax, scale, offset, rows, columns, group.quant_type, group.block_size)
    return stored.t() if group.transposed else stored
