"""Products in fp32 for a CPU that has no bf16 (fp16) matrix instructions, where the library's are 6 to 10 times slower.

Everything between the reading of x or dy and the rounding of y or dx is fp32: the weight is dequantized straight to fp32,
the low-rank term is added before the only rounding. Nothing fp32 outlives the call except reused buffers, which hold one
weight and ROWS rows. M tokens, N output features, K input features, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...lora_group import LoRAGroup, scratch

ROWS = 2048  # rows at a time: bounds the fp32 copies of x, y, dx and dy


def _row_ranges(rows: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _widened(name: str, x: Tensor) -> Tensor:
    """x [M, K] in a reused fp32 buffer."""
    return scratch(name, (x.shape[0], x.shape[1]), x, torch.float32).copy_(x)


def _weight(group: LoRAGroup, index: int, k: int) -> Tensor:
    out = scratch("weight", (group.out_features[index], k), group.weight[index], torch.float32)
    return group.dense_weight(index, k, out=out)


def _dropped(group: LoRAGroup, j: int, x: Tensor, wide: Tensor) -> Tensor:
    """dropout_j(x) in fp32; the mask is drawn as for x's own dtype, so that every kernel drops the same elements."""
    return wide * group.mask(j, x) if group.dropout else wide


def lora_forward(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """x [M, K] -> ([y_i [M, N_i]], h [M, sum R]) in x's dtype."""
    m, k = x.shape
    ys = [x.new_empty((m, n)) for n in group.out_features]
    h = x.new_empty((m, sum(group.ranks())))
    for rows in _row_ranges(m, ROWS):
        wide = _widened("x", x[rows])
        low = [_dropped(group, j, x[rows], wide) @ a.float().t() for j, a in enumerate(group.lora_a)]
        if low:
            torch.cat([part.to(h.dtype) for part in low], dim=1, out=h[rows])
        for i, mine in enumerate(group.adapters_of()):
            y = scratch("y", (wide.shape[0], group.out_features[i]), x, torch.float32)
            torch.mm(wide, _weight(group, i, k).t(), out=y)
            for j in mine:
                y.addmm_(low[j], group.lora_b[j].float().t(), alpha=group.factor(j))
            ys[i][rows] = y if not bias else y.add_(bias[i])
    return ys, h


def lora_backward(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """[dy_i [M, N_i]] -> (dx [M, K] in x's dtype, [dA_j], [dB_j] in the parameters' dtypes)."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else None
    da = [torch.zeros_like(a, dtype=torch.float32) for a in group.lora_a] if need_adapters else []
    db = [torch.zeros_like(b, dtype=torch.float32) for b in group.lora_b] if need_adapters else []
    for rows in _row_ranges(x.shape[0], ROWS):
        parts = h[rows].float().split(group.ranks(), dim=1) if group.lora_a else []
        wide = _widened("x", x[rows]) if need_adapters else None
        wide_dx = scratch("dx", (x[rows].shape[0], x.shape[1]), x, torch.float32) if need_dx else None
        for i, mine in enumerate(group.adapters_of()):
            dy = _widened("y", dys[i][rows])
            if wide_dx is not None:
                wide_dx.addmm_(dy, _weight(group, i, x.shape[1]), beta=0 if i == 0 else 1)
            for j in mine:
                g = (dy @ group.lora_b[j].float()).mul_(group.factor(j))
                if wide is not None:
                    db[j].addmm_(dy.t(), parts[j], alpha=group.factor(j))
                    da[j].addmm_(g.t(), _dropped(group, j, x[rows], wide))
                if wide_dx is not None:
                    _add_low_rank_dx(group, j, g, x[rows], wide_dx)
        if dx is not None and wide_dx is not None:
            dx[rows] = wide_dx
    grads_a = [grad.to(a.dtype) for grad, a in zip(da, group.lora_a)]
    return dx, grads_a, [grad.to(b.dtype) for grad, b in zip(db, group.lora_b)]


def _add_low_rank_dx(group: LoRAGroup, j: int, g: Tensor, x: Tensor, dx: Tensor) -> None:
    a = group.lora_a[j].float()
    if group.dropout:
        dx += (g @ a) * group.mask(j, x)
    else:
        dx.addmm_(g, a)
