"""Folding: `W' = W + sum_i scale_i * B_i @ A_i`, accumulated in fp64 and rounded once.

Work goes by blocks of rows that fit a cache: the wide copy stays at BLOCK_BYTES whatever the size of the weight, and
fp64 in blocks takes less time than fp32 in one piece (4096 x 4096, bf16, rank 16, one core: 40 and 68 ms). Unlike an fp32
product it is not changed by `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class LoraTerm:
    """One adapter's part of one weight: `scale * b @ a`, where `scale` is the adapter's weight times its scaling.

    `a` is [r, in], `b` is [out, r], any float dtype; for a weight of E experts [E, r, in] and [E, out, r].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class LayerError:
    """How far a written tensor is from the exact sum (both read as fp64; `relative` is a quotient of 2-norms)."""

    name: str
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float

    def to_dict(self) -> dict[str, str | float]:
        return asdict(self)


def fold(
    weight: torch.Tensor,
    terms: Sequence[LoraTerm],
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` [out, in] (`transposed`: [in, out]) + the terms -> a new tensor of `dtype` (None: the weight's).

    With `magnitude` [out] (DoRA), each row of the sum is brought to that length. Experts are folded one by one:
    `weight` is [E, out, in] or [E, in, out].

    The error against the real sum is at most half a unit in the last place of `dtype` (plus fp64's own rounding, and
    for 16-bit results 2^-16 of a unit, since torch rounds fp64 to 16 bits by way of fp32).
    """
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    for rows, exact in exact_blocks(weight, terms, transposed=transposed, magnitude=magnitude):
        out[rows] = exact
    return out


def exact_blocks(
    weight: torch.Tensor,
    terms: Sequence[LoraTerm],
    *,
    transposed: bool = False,
    magnitude: torch.Tensor | None = None,
) -> Iterator[tuple[Any, torch.Tensor]]:
    """The sum in fp64 by blocks of rows: (index of rows of `weight`, values of those rows, until the next block)."""
    if magnitude is None:
        yield from _sums(weight, terms, transposed)
        return
    wanted = magnitude.to(weight.device, torch.float64)
    if not transposed:
        for rows, block in _sums(weight, terms, transposed):
            yield rows, block * (wanted[rows] / block.norm(dim=1))[:, None]
        return
    squares = sum(block.square().sum(dim=0) for _, block in _sums(weight, terms, transposed))
    factor = wanted / torch.as_tensor(squares).sqrt()
    for rows, block in _sums(weight, terms, transposed):
        yield rows, block * factor


def _sums(weight: torch.Tensor, terms: Sequence[LoraTerm], transposed: bool) -> Iterator[tuple[Any, torch.Tensor]]:
    if weight.dim() == 3 and terms:
        for expert, matrix in enumerate(weight):
            own = [LoraTerm(term.a[expert], term.b[expert], term.scale) for term in terms]
            for rows, block in _sums(matrix, own, transposed):
                yield (expert, rows), block
        return
    left, right = _factors(weight, terms, transposed)
    step = max(1, BLOCK_BYTES // (8 * max(1, prod(weight.shape[1:]))))
    # One block's memory for all: fresh pages cost more than the sums.
    buffer = torch.empty((min(step, weight.shape[0]), *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        part = weight[rows]
        block = buffer[: part.shape[0]].copy_(part)
        if left is not None and right is not None:
            block.addmm_(left[rows], right)
        yield rows, block


def measure(
    name: str,
    written: torch.Tensor,
    weight: torch.Tensor,
    terms: Sequence[LoraTerm],
    *,
    transposed: bool = False,
    magnitude: torch.Tensor | None = None,
) -> LayerError:
    """The error of `written` against the exact sum of `weight` and the terms, all in fp64."""
    worst = total = error_square = exact_square = written_square = product = 0.0
    for rows, exact in exact_blocks(weight, terms, transposed=transposed, magnitude=magnitude):
        got = written[rows].to(torch.float64)
        error = got - exact
        worst = max(worst, float(error.abs().max()))
        total += float(error.abs().sum())
        error_square += float(error.square().sum())
        exact_square += float(exact.square().sum())
        written_square += float(got.square().sum())
        product += float((got * exact).sum())
    norms = (exact_square * written_square) ** 0.5
    return LayerError(
        name,
        max_abs=worst,
        mean_abs=total / max(1, weight.numel()),
        relative=(error_square / exact_square) ** 0.5 if exact_square else error_square**0.5,
        cosine=product / norms if norms else float(exact_square == written_square),
    )


def _factors(
    weight: torch.Tensor, terms: Sequence[LoraTerm], transposed: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """All terms as one product `left @ right` of rank sum(r_i), in fp64 on the weight's device."""
    wide = [(t.a.to(weight.device, torch.float64), t.b.to(weight.device, torch.float64) * t.scale) for t in terms]
    if not wide:
        return None, None
    if transposed:
        return torch.cat([a.t() for a, _ in wide], dim=1), torch.cat([b.t() for _, b in wide], dim=0)
    return torch.cat([b for _, b in wide], dim=1), torch.cat([a for a, _ in wide], dim=0)
