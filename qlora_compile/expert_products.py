"""The arithmetic of `qlora::grouped_lora_linear` and its backward: one expert after the other, those with tokens only.

Shapes: S rows (token-expert pairs) sorted by expert, E experts, N output and K input features, R the rank of one
adapter. An expert's matrix is [N, K], or [K, N] if `transposed`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .lora_group import choose_kernel, dequantize_into, kernel_for, scratch, suit_kernels
from .nf4 import DTYPES

FUSED = "fused_fp32"  # the kernel that reads codes and adapters where they are


def decode_expert(
    out: Tensor, codes: Tensor, scales: Sequence[Tensor], expert: int, quant_type: str, block_size: int
) -> Tensor:
    """Write one expert's matrix, as it is stored, into `out`; `scales` is [absmax] or [absmax, scale, offset]."""
    absmax, *double = (part[expert] for part in scales)
    scale, offset = double or (None, None)
    return dequantize_into(out, codes[expert], absmax, scale, offset, quant_type, block_size)


class ExpertGroup:
    """One call's weights and adapters, by expert. No tensor is copied here but, without kernels, the adapters' cast."""

    def __init__(
        self,
        offsets: Tensor,
        weight: Tensor,
        scales: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scaling: Sequence[Tensor],
        alpha: Sequence[float],
        shape: tuple[int, int],
        transposed: bool,
        quant_type: str,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.offsets, self.weight, self.scales, self.shape = offsets, weight, scales, shape
        self.lora_a, self.lora_b = lora_a, lora_b
        self.factors = [alpha_j * _read(weight_j, dtype) for alpha_j, weight_j in zip(alpha, scaling, strict=True)]
        self.transposed, self.quant_type, self.block_size, self.dtype = transposed, quant_type, block_size, dtype

    @functools.cached_property
    def a(self) -> list[Tensor]:
        """Each adapter's A [E, R, K] in the compute dtype."""
        return [t.to(self.dtype) for t in self.lora_a]

    @functools.cached_property
    def b(self) -> list[Tensor]:
        """Each adapter's B [E, N, R] in the compute dtype."""
        return [t.to(self.dtype) for t in self.lora_b]

    def low_rank_kernel(self, op: str) -> Callable[..., Any] | None:
        """The kernel "lora_down", "lora_up" or "lora_backward", as for a linear's adapters, if it covers this call."""
        numbers = not any(isinstance(factor, Tensor) for factor in self.factors)
        suits = numbers and suit_kernels((*self.lora_a, *self.lora_b), self.dtype)
        return kernel_for(op, self.weight.device) if suits else None

    def implementation(self, op: str, x: Tensor, forced: str) -> Callable[..., Any]:
        """The `run` of the kernel chosen for this op and number of rows: `qlora_compile.runtime.kernels.dispatch`."""
        sizes = problem(self.shape, self.lora_a, self.lora_b, self.dtype, self.quant_type, self.block_size)
        choice = choose_kernel(op, forced=forced, rows=len(x), device=x.device.type, **sizes)
        return choice.candidate.run  # type: ignore[no-any-return]

    def runs(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) for each expert that has rows. Reads the offsets: on a GPU the one wait of the op."""
        start = 0
        for expert, end in enumerate(self.offsets.tolist()):
            if end > start:
                yield expert, slice(start, int(end))
                start = int(end)

    def dense(self, expert: int) -> Tensor:
        """The expert's matrix as [N, K] in the compute dtype: in `scratch`, valid until the next call."""
        n, k = self.shape
        stored = (k, n) if self.transposed else (n, k)
        if self.quant_type == "none":
            matrix = self.weight[expert].to(self.dtype)
        else:
            out = scratch("weight", stored, self.weight, self.dtype)
            matrix = decode_expert(out, self.weight, self.scales, expert, self.quant_type, self.block_size)
        return matrix.t() if self.transposed else matrix

    def columns(self) -> list[slice]:
        """The columns of h [S, sum R] that belong to each adapter."""
        ends = [0, *itertools.accumulate(a.shape[1] for a in self.lora_a)]
        return [slice(first, last) for first, last in itertools.pairwise(ends)]


def problem(
    shape: tuple[int, int],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    dtype: torch.dtype,
    quant_type: str,
    block_size: int,
) -> dict[str, Any]:
    """What the choice of a kernel depends on besides rows and device, with the kernels that these A and B rule out and why.
    `shape` is (N, K)."""
    (n, k), rank = shape, sum(a.shape[1] for a in lora_a)
    other = next((t.dtype for t in (*lora_a, *lora_b) if t.dtype not in DTYPES), None)
    barred = () if other is None else ((FUSED, f"adapters are in {str(other).removeprefix('torch.')}"),)
    kind = {"dtype": dtype, "quant_type": quant_type, "block_size": block_size}
    return {"n": (n,), "k": k, "rank": rank, **kind, "barred": barred}


def library_forward(group: ExpertGroup, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, K] -> (y [S, N], h [S, sum R]) in the compute dtype; rows of no expert are zero.

    As in `lora_group.forward`, the library adds its product to the low-rank one within the fp32 sum.
    """
    columns = group.columns()
    y = x.new_empty((x.shape[0], group.shape[0]))
    h = x.new_empty((x.shape[0], sum(a.shape[1] for a in group.lora_a)))
    down, up = group.low_rank_kernel("lora_down"), group.low_rank_kernel("lora_up")
    end = 0
    for expert, rows in group.runs():
        mine, out = x[rows], y[rows]
        if down is not None:
            down(mine, [a[expert] for a in group.lora_a], h[rows])
        for j, (factor, own) in enumerate(zip(group.factors, columns)):
            if down is None:
                h[rows, own] = mine @ group.a[j][expert].t()
            low = h[rows, own]
            if up is not None:
                up(low, group.lora_b[j][expert], factor, out, j > 0)
            else:
                _multiply(out, scaled(low, factor, rows), group.b[j][expert].t(), add=j > 0)
        _multiply(out, mine, group.dense(expert).t(), add=bool(columns))
        end = rows.stop
    y[end:].zero_()
    h[end:].zero_()
    return y, h


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """out = left right, or out += left right: one rounding of the sum."""
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def scaled(low: Tensor, factor: Tensor | float, rows: slice) -> Tensor:
    """[rows, R], each row times its adapter's factor."""
    return low * (factor[rows] if isinstance(factor, Tensor) and factor.dim() else factor)


def _read(weight: Tensor, dtype: torch.dtype) -> Tensor | float:
    """An adapter's weight: a number where reading it costs nothing (CPU), else 0-dim in fp32; or [S, 1] where each row of
    the batch has a choice of its own."""
    if weight.dim():
        return weight.to(dtype)[:, None]
    return weight.item() if weight.device.type == "cpu" else weight.float()


def library_backward(
    group: ExpertGroup, dy: Tensor, x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dy [S, N] -> (dx [S, K] if it is needed, [dA_j], [dB_j]); an expert without rows has gradient zero.

    With g = factor dy_e B_e:  dx_e = dy_e W_e + g A_e,  dA_e = gᵀ x_e,  dB_e = factor dy_eᵀ h_e.
    """
    columns = group.columns()
    dx = torch.empty_like(x) if need_dx else None
    da = [torch.zeros_like(a) for a in group.lora_a] if need_adapters else []
    db = [torch.zeros_like(b) for b in group.lora_b] if need_adapters else []
    kernel = group.low_rank_kernel("lora_backward")
    end = 0
    for expert, rows in group.runs():
        for j, (factor, own) in enumerate(zip(group.factors, columns)):
            mine = h[rows, own]
            if kernel is not None:
                low = torch.empty_like(mine, memory_format=torch.contiguous_format)
                grads = (da[j][expert], db[j][expert]) if need_adapters else (None, None)
                kernel(dy[rows], x[rows], mine, group.lora_b[j][expert], factor, low, *grads)
            else:
                low = scaled(dy[rows] @ group.b[j][expert], factor, rows)
                if need_adapters:
                    da[j][expert] = low.t() @ x[rows]
                    db[j][expert] = dy[rows].t() @ scaled(mine, factor, rows)
            if dx is not None:
                _multiply(dx[rows], low, group.a[j][expert], add=j > 0)
        if dx is not None:
            _multiply(dx[rows], dy[rows], group.dense(expert), add=bool(columns))
        end = rows.stop
    if dx is not None:
        dx[end:].zero_()
    return dx, da, db
