"""Products in fp32 for a CPU that has no bf16 (fp16) matrix instructions, where the library's are 6 to 10 times slower.

Everything between the reading of x or dy and the rounding of y or dx is fp32: the weight is dequantized straight to fp32,
the low-rank term is added before the only rounding. Nothing fp32 outlives the call except reused buffers, which hold one
weight and ROWS rows of x, y, dx or dy. M tokens, N output features, K input features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ... import lora_group
from ...lora_group import LoRAGroup, scratch


def _row_ranges(rows: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _widened(name: str, x: Tensor) -> Tensor:
    """x [M, K] in a reused fp32 buffer."""
    return scratch(name, (x.shape[0], x.shape[1]), x, torch.float32).copy_(x)


def _weight(group: LoRAGroup, index: int, k: int) -> Tensor:
    out = scratch("weight", (group.out_features[index], k), group.weight[index], torch.float32)
    return group.dense_weight(index, k, out=out)


def _mask_drawers(group: LoRAGroup, x: Tensor) -> list[Callable[[Tensor], Tensor]]:
    return [group.mask_drawer(j, x) for j in range(len(group.lora_a))] if group.dropout else []


def _masks(drawers: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """Each adapter's mask for these rows of x, in x's own dtype as every kernel draws it; none where nothing drops."""
    return [draw(torch.empty_like(x)) for draw in drawers]


def lora_forward(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """x [M, K] -> ([y_i [M, N_i]], h [M, sum R]) in x's dtype."""
    m, k = x.shape
    ys = [x.new_empty((m, n)) for n in group.out_features]
    h = x.new_empty((m, sum(group.ranks())))
    drawers = _mask_drawers(group, x)
    for rows in _row_ranges(m, lora_group.ROWS):
        wide, masks = _widened("x", x[rows]), _masks(drawers, x[rows])
        low = [(wide * masks[j] if masks else wide) @ a.float().t() for j, a in enumerate(group.lora_a)]
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
    drawers = _mask_drawers(group, x)
    for rows in _row_ranges(x.shape[0], lora_group.ROWS):
        masks = _masks(drawers, x[rows])
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
                    da[j].addmm_(g.t(), wide * masks[j] if masks else wide)
                if wide_dx is not None and masks:
                    wide_dx += (g @ group.lora_a[j].float()) * masks[j]
                elif wide_dx is not None:
                    wide_dx.addmm_(g, group.lora_a[j].float())
        if dx is not None and wide_dx is not None:
            dx[rows] = wide_dx
    grads_a = [grad.to(a.dtype) for grad, a in zip(da, group.lora_a)]
    return dx, grads_a, [grad.to(b.dtype) for grad, b in zip(db, group.lora_b)]
