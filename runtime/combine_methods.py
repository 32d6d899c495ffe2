"""Several low-rank terms of one weight -> one low-rank pair, by six definitions; with how far the result is off.

    exact sum   D = sum_i c_i B_i A_i,   c_i = weight_i * scaling_i;   t_i = scaling_i B_i A_i is adapter i's task vector

    cat, sequential   A' = [A_1; A_2; ...], B' = [c_1 B_1, c_2 B_2, ...]: D itself, of rank sum r_i
    svd               the best approximation of D of a given rank (Eckart-Young), without ever forming D
    linear            A' = sum sign(c_i) sqrt|c_i| A_i, B' = sum sqrt|c_i| B_i: peft's definition, D plus B_i A_j terms
    ties              arXiv 2306.01708 on the task vectors: trim, elect signs, disjoint mean; then the best of a rank
    dare              arXiv 2311.03099: drop values of t_i at random, rescale, weighted sum; then the best of a rank

Everything is computed in fp64. peft's `ties` and `dare_linear` work on A and B by themselves, so that their result depends
on how a product was split in two; these work on products, as the papers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

METHODS = ("cat", "svd", "linear", "sequential", "ties", "dare")
SIGN_METHODS = ("total", "frequency")
Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r]


@dataclass(frozen=True)
class CombineOptions:
    """`rank` (svd, ties, dare; None: the largest that a part has at the layer), `density` (fraction of each task vector
    that ties and dare keep), `majority_sign` (ties: by "total" magnitude or by "frequency")."""

    rank: int | None = None
    density: float = 0.5
    majority_sign: str = "total"


@dataclass(frozen=True)
class Term:
    """One adapter's part of one layer: `scaling * b @ a` is its task vector, `weight` how strongly it counts.

    `generator` draws what dare drops.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: float
    generator: torch.Generator

    @property
    def factor(self) -> float:
        return self.weight * self.scaling

    @property
    def task_vector(self) -> torch.Tensor:
        """[out, in] in fp64, without the weight."""
        return (self.b.double() @ self.a.double()) * self.scaling


def combine_terms(
    method: str, terms: Sequence[Term], options: CombineOptions, dtype: torch.dtype
) -> tuple[Pair, float]:
    """(A', B') in `dtype`, whose product is the combination with a scaling of 1, and its relative residual.

    The residual is the Frobenius norm of what B' A' is off, over that of what it stands for: the exact sum (for ties and
    dare: their dense result), the rounding to `dtype` included.
    """
    rank = options.rank or max(term.a.shape[0] for term in terms)
    if method in ("ties", "dare"):
        dense = _ties(terms, options) if method == "ties" else _dare(terms, options)
        a, b = _rounded(_best_of_dense(dense, rank), dtype)
        error = float((b.double() @ a.double() - dense).norm())
        return (a, b), _relative(error, float(dense.norm()))
    exact = _stacked(terms)
    pair = _rounded(
        {"svd": lambda: best_of_rank(exact, rank), "linear": lambda: _linear(terms)}.get(method, lambda: exact)(), dtype
    )
    return pair, relative_residual(pair, exact)


def relative_residual(pair: Pair, exact: Pair) -> float:
    """|B'A' - BA| / |BA| in Frobenius norms, from small cores of the factors: nothing of size [out, in] is formed."""
    off = (torch.cat([pair[0].double(), exact[0]]), torch.cat([pair[1].double(), -exact[1]], dim=1))
    return _relative(_norm(off), _norm(exact))


def best_of_rank(pair: Pair, rank: int) -> Pair:
    """The best approximation of `b @ a` of at most `rank`, its singular values shared evenly by both factors."""
    a, b = pair
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(left_core @ right_core.t(), full_matrices=False)
    root = s[:rank].sqrt()
    return _signed((root[:, None] * vh[:rank]) @ right.t(), left @ (u[:, :rank] * root))


def _stacked(terms: Sequence[Term]) -> Pair:
    """The exact sum as one product, in fp64."""
    a = torch.cat([term.a.double() for term in terms])
    b = torch.cat([term.b.double() * term.factor for term in terms], dim=1)
    return a, b


def _linear(terms: Sequence[Term]) -> Pair:
    roots = [abs(term.factor) ** 0.5 for term in terms]
    signs = [1.0 if term.factor >= 0 else -1.0 for term in terms]
    a = sum(term.a.double() * (root * sign) for term, root, sign in zip(terms, roots, signs, strict=True))
    b = sum(term.b.double() * root for term, root in zip(terms, roots, strict=True))
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a, b


def _ties(terms: Sequence[Term], options: CombineOptions) -> torch.Tensor:
    """Trimmed task vectors -> the weighted mean of those values whose sign is the elected one."""
    trimmed = [_trim(term.task_vector, options.density) for term in terms]
    by = (lambda t: t) if options.majority_sign == "total" else torch.sign
    elected = torch.where(_sum(by, trimmed) >= 0, 1.0, -1.0).to(trimmed[0].dtype)
    total = torch.zeros_like(trimmed[0])
    count = torch.zeros_like(trimmed[0])
    for term, values in zip(terms, trimmed, strict=True):
        agrees = values.sign() == elected
        total += torch.where(agrees, values * term.weight, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def _dare(terms: Sequence[Term], options: CombineOptions) -> torch.Tensor:
    total: torch.Tensor | None = None
    for term in terms:
        values = term.task_vector
        keep = torch.rand(values.shape, generator=term.generator, dtype=torch.float64) < options.density
        values = torch.where(keep, values * (term.weight / options.density), 0.0)
        total = values if total is None else total.add_(values)
    assert total is not None
    return total


def _trim(values: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest values: the fraction `density` of them, rounded down."""
    keep = int(density * values.numel())
    if keep >= values.numel():
        return values
    kept = torch.zeros_like(values).view(-1)
    largest = values.abs().view(-1).topk(keep, sorted=False).indices
    kept[largest] = values.reshape(-1)[largest]
    return kept.view_as(values)


def _best_of_dense(dense: torch.Tensor, rank: int) -> Pair:
    """The best approximation of that rank, from the eigenvectors of the smaller of D Dᵀ and Dᵀ D."""
    if dense.shape[0] > dense.shape[1]:
        a, b = _best_of_dense(dense.t(), rank)
        return _signed(b.t(), a.t())
    _, vectors = torch.linalg.eigh(dense @ dense.t())  # ascending
    u = vectors[:, -rank:].flip(1)
    rest = u.t() @ dense
    root = rest.norm(dim=1).sqrt().clamp(min=torch.finfo(dense.dtype).tiny ** 0.25)
    return _signed(rest / root[:, None], u * root)


def _signed(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Singular vectors are unique up to a sign: make the largest value of each column of B positive."""
    sign = torch.gather(b, 0, b.abs().argmax(dim=0, keepdim=True)).sign()
    sign[sign == 0] = 1
    return a * sign.t(), b * sign


def _rounded(pair: Pair, dtype: torch.dtype) -> Pair:
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous()


def _norm(pair: Pair) -> float:
    """|b a| in the Frobenius norm."""
    return float((torch.linalg.qr(pair[1]).R @ torch.linalg.qr(pair[0].t()).R.t()).norm())


def _relative(error: float, norm: float) -> float:
    return error / norm if norm else error


def _sum(function: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total += function(tensor)
    return total
