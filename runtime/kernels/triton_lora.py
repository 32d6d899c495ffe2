"""The candidates for `lora_linear` and its backward on a GPU: Triton kernels over one group.

    triton_vector      up to 2 rows: two launches for the whole group and its adapters, straight from the codes
    triton_gemm        a GEMM for each linear, decoded between load and product; K divided over programs for few rows
    triton_dx          backward: dX of the group as one sum straight from the codes, low-rank products in Triton
    triton_low_rank    the weight dequantized once, the library's GEMM, low-rank products in Triton
    joined_gemm        the weight dequantized beside its adapters' B: the library's GEMM over K + R, no pass over y
    summed_gemm        backward of several linears: dX summed in fp32 by the library's GEMMs, no copy of the dy

None is preferred: where no measurement speaks (a shipped table, `autotune=True`), the library's GEMM on the dequantized
weight runs. M rows of x, N output and K input features, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...lora_gradients import grad_x
from ...lora_group import LoRAGroup, scratch, split_ranks
from ...nf4 import QuantizedData
from . import dispatch, triton_linear, triton_low_rank, triton_operands, triton_vector
from .dispatch import Candidate, Problem
from .triton_low_rank import Dropout, Scale
from .triton_operands import Adapter, VectorAdapter, Weight


def _weight(group: LoRAGroup, index: int, k: int) -> Weight:
    double = bool(group.absmax_scale)
    data = QuantizedData(
        group.weight[index],
        group.absmax[index],
        group.absmax_scale[index] if double else None,
        group.absmax_offset[index] if double else None,
    )
    return Weight(data, group.out_features[index], k, group.quant_type, group.block_size)


def _scale(group: LoRAGroup, mine: Sequence[int]) -> Scale:
    return Scale([group.alpha[j] for j in mine], [group.scaling[j] for j in mine] if group.scaling else [])


def _dropout(group: LoRAGroup, device: torch.device, mine: Sequence[int]) -> Dropout:
    """The seeds of these adapters on the device; 8 bytes each, copied without waiting."""
    seeds = [group.seed[j].to(device, non_blocking=True) for j in mine] if group.dropout else []
    return Dropout(seeds, 1 - group.dropout)


def _launches(ranks: Sequence[int]) -> list[slice]:
    """The adapters of each launch: as many as its registers hold, mostly all."""
    out, first, padded = [], 0, 0
    for j, rank in enumerate(ranks):
        more = triton_low_rank.padded(rank)
        if j > first and padded + more > triton_low_rank.MOST_RANKS:
            out.append(slice(first, j))
            first, padded = j, 0
        padded += more
    return [*out, slice(first, len(ranks))] if ranks else []


def _columns(low: Tensor, ranks: Sequence[int], part: slice) -> Tensor:
    """The columns of these adapters in [M, sum R]."""
    first = sum(ranks[: part.start])
    return low[:, first : first + sum(ranks[part])]


def low_rank(group: LoRAGroup, x: Tensor) -> Tensor:
    """h [M, sum R]: all adapters of the group in one read of x."""
    ranks = group.ranks()
    h = x.new_empty((x.shape[0], sum(ranks)))
    for part in _launches(ranks):
        mine = range(len(ranks))[part]
        factors = [group.lora_a[j] for j in mine]
        triton_low_rank.lora_down(x, factors, _columns(h, ranks, part), dropout=_dropout(group, x.device, mine))
    return h


def _adapters(group: LoRAGroup, h: Tensor) -> list[list[Adapter]]:
    """For each linear its adapters: h_j, B_j, alpha_j, scaling_j."""
    parts = split_ranks(group, h)

    def adapter(j: int) -> Adapter:
        scaling = group.scaling[j] if group.scaling else None
        return Adapter(parts[j], group.lora_b[j].contiguous(), group.alpha[j], scaling)

    return [[adapter(j) for j in mine] for mine in group.adapters_of()]


def forward_vector(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    m, k = x.shape
    outs = [x.new_empty((m, n)) for n in group.out_features]
    h = x.new_empty((m, sum(group.ranks())))

    def adapter(j: int) -> VectorAdapter:
        scaling = group.scaling[j] if group.scaling else None
        return VectorAdapter(group.lora_a[j], group.lora_b[j].contiguous(), group.alpha[j], scaling)

    adapters = [[adapter(j) for j in mine] for mine in group.adapters_of()]
    triton_vector.lora_linear_vector(
        x, [_weight(group, i, k) for i in range(len(outs))], outs, h, adapters, [b.contiguous() for b in bias]
    )
    return outs, h


def forward_gemm(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    m, k = x.shape
    h = low_rank(group, x)
    outs = []
    for i, mine in enumerate(_adapters(group, h)):
        outs.append(x.new_empty((m, group.out_features[i])))
        triton_linear.lora_linear_gemm(x, _weight(group, i, k), outs[i], mine, bias[i] if bias else None)
    return outs, h


def forward_low_rank(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The low-rank product first: the library adds its own to it within the fp32 sum (see `lora_group.forward`)."""
    h = low_rank(group, x)
    parts, ranks = split_ranks(group, h), group.ranks()
    outs = []
    for i, own in enumerate(group.adapters_of()):
        b = bias[i].to(group.dtype) if bias else None
        if not own:
            outs.append(group.product(i, x, b))
            continue
        y = x.new_empty((x.shape[0], group.out_features[i]))
        for part in _launches(ranks[own.start : own.stop]):
            mine = own[part]
            factors, later = [group.lora_b[j] for j in mine], mine.start > own.start
            triton_low_rank.lora_up(y, [parts[j] for j in mine], factors, _scale(group, mine), accumulate=later)
        y.addmm_(x, group.dense_weight(i, x.shape[1]).t())
        outs.append(y if b is None else y.add_(b))
    return outs, h


def forward_joined(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """y_i = [x | h] [W_i | scale B_i]^T: one product over K + ranks for each linear, with no pass over y besides.

    The ranks of the whole group stand beside x once; beside W_i those of other linears are zero, and so are some more
    that make rows of whole 16 bytes.
    """
    h, ranks = low_rank(group, x), group.ranks()
    m, k = x.shape
    width = k + -(-sum(ranks) // 16) * 16
    joined = scratch("joined", (m, width), x, group.dtype)
    joined[:, :k].copy_(x)
    joined[:, k : k + sum(ranks)].copy_(h)
    joined[:, k + sum(ranks) :].zero_()
    outs = []
    for i, own in enumerate(group.adapters_of()):
        weight = scratch("weight", (group.out_features[i], width), x, group.dtype)
        group.dense_weight(i, k, out=weight[:, :k])
        weight[:, k:].zero_()
        for j in own:
            first = k + sum(ranks[:j])
            torch.mul(group.lora_b[j], group.factor(j), out=weight[:, first : first + ranks[j]])
        outs.append(torch.nn.functional.linear(joined, weight, bias[i].to(group.dtype) if bias else None))
    return outs, h


def low_rank_grads(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_adapters: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """g_j = scale_j dy B_j [M, R], dA_j = g_jᵀ dropout_j(x), dB_j = scale_j dyᵀ h_j; the last two if wanted."""
    ranks = group.ranks()
    if not ranks:
        return [], [], []
    parts = split_ranks(group, h)
    g: list[Tensor] = []
    da = [torch.empty_like(a) for a in group.lora_a] if need_adapters else []
    db = [torch.empty_like(b) for b in group.lora_b] if need_adapters else []
    for dy, own in zip(dys, group.adapters_of(), strict=True):
        for part in _launches(ranks[own.start : own.stop]):
            mine = own[part]
            scale, factors = _scale(group, mine), [group.lora_b[j].t() for j in mine]
            low = x.new_empty((x.shape[0], sum(ranks[j] for j in mine)))  # whole rows: torch.cat copies others slowly
            triton_low_rank.lora_down(dy, factors, low, scale)
            g += low.split_with_sizes([ranks[j] for j in mine], dim=1) if len(mine) > 1 else [low]
            if need_adapters:
                triton_low_rank.lora_over_tokens([parts[j] for j in mine], dy, [db[j].t() for j in mine], scale)
    for part in _launches(ranks) if need_adapters else []:
        dropout = _dropout(group, x.device, range(len(ranks))[part])
        triton_low_rank.lora_over_tokens(g[part], x, da[part], dropout=dropout)
    return g, da, db


def backward_dx(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    g, da, db = low_rank_grads(group, dys, x, h, need_adapters)
    if not need_dx:
        return None, da, db
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    weights = [_weight(group, i, x.shape[1]) for i in range(len(dys))]
    adapters = [Adapter(low, a.contiguous()) for low, a in zip(g, group.lora_a, strict=True)]
    triton_linear.lora_linear_dx(dx, dys, weights, adapters, _dropout(group, x.device, range(len(g))))
    return dx, da, db


def backward_low_rank(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    g, da, db = low_rank_grads(group, dys, x, h, need_adapters)
    return grad_x(group, dys, g, x) if need_dx else None, da, db


def backward_summed(
    group: LoRAGroup, dys: list[Tensor], x: Tensor, h: Tensor, need_dx: bool, need_adapters: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """dX = dy_0 W_0 + dy_1 W_1 + ... summed in fp32 by the library, low-rank products added at the one rounding: no dy is
    copied. The products write and read 8 K bytes a token for each linear, torch.cat of the dy 4 sum N."""
    g, da, db = low_rank_grads(group, dys, x, h, need_adapters)
    if not need_dx:
        return None, da, db
    if len(_launches(group.ranks())) != 1:  # more than one launch adds
        return grad_x(group, dys, g, x), da, db
    total: Tensor | None = None
    for i, dy in enumerate(dys):
        total = _add_product(total, dy, group.dense_weight(i, x.shape[1]))
    assert total is not None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    factors, dropout = [a.t() for a in group.lora_a], _dropout(group, x.device, range(len(g)))
    triton_low_rank.lora_up(dx, g, factors, dropout=dropout, partial=total[None])
    return dx, da, db


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left [M, N] right [N, K] in fp32; a CPU, where Triton's interpreter runs, has no product with that result."""
    if left.device.type == "cpu" or left.dtype == torch.float32:
        product = left.float() @ right.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32)


def _declines_device(problem: Problem) -> str | None:
    """What keeps the kernels that prove themselves from this device (no compiler for launchers, ...) keeps these, too."""
    from . import find

    needed = ("dequantize_4bit", "dropout_mask") if problem.dropout else ("dequantize_4bit",)
    return next((f"the kernel {op} does not work here" for op in needed if find(op, problem.device) is None), None)


def _declines_low_rank(problem: Problem) -> str | None:
    if not problem.rank:
        return "there is no adapter"
    if problem.rank > triton_low_rank.MOST_RANKS:
        return f"for at most {triton_low_rank.MOST_RANKS} ranks together"
    return _declines_device(problem)


def _declines_codes(problem: Problem) -> str | None:
    if problem.quant_type == "none":
        return "the weight is dense"
    if triton_operands.declined(problem.k, problem.block_size) is not None:
        return f"K is no multiple of {triton_operands.SMALLEST_CHUNK}"
    return _declines_low_rank(problem) if problem.rank else _declines_device(problem)


def _declines_summed(problem: Problem) -> str | None:
    if torch.version.hip is not None:
        return "ROCm has no product of 16-bit factors in fp32"
    if len(problem.n) < 2:
        return "for several linears"
    return f"for more than {MOST_FEW} rows" if problem.m <= MOST_FEW else _declines_low_rank(problem)


def _declines_joined(problem: Problem) -> str | None:
    if problem.quant_type != "none" and problem.k % problem.block_size:
        return f"K is no multiple of the block of {problem.block_size}"
    return f"for more than {MOST_FEW} rows" if problem.m <= MOST_FEW else _declines_low_rank(problem)


def _declines_vector(problem: Problem) -> str | None:
    most = triton_vector.MOST_VECTOR_ROWS
    if problem.m > most:
        return f"for at most {most} rows"
    if not problem.k or 0 in problem.n:
        return "for weights with rows and columns"
    return "it draws no masks" if problem.dropout else _declines_codes(problem)


def _never(problem: Problem) -> bool:
    """No table speaks: not by itself."""
    return False


MOST_FEW = 64  # rows up to which reading the codes wins everywhere
CODES, DOWN, UP = "lora_linear_gemm", "lora_down", "lora_up"


def register() -> None:
    """Adds the candidates; where Triton is installed."""
    over, codec = "lora_over_tokens", "dequantize_4bit"

    def add(op: str, name: str, run: Callable[..., Any], declines: Callable[[Problem], str | None], *used: str) -> None:
        dispatch.register(Candidate(op, name, run, ("cuda",), declines, _never, used))

    add("lora_linear", "triton_vector", forward_vector, _declines_vector, "lora_linear_small")
    add("lora_linear", "triton_gemm", forward_gemm, _declines_codes, DOWN, CODES)
    add("lora_linear", "triton_low_rank", forward_low_rank, _declines_low_rank, codec, DOWN, UP)
    add("lora_linear", "joined_gemm", forward_joined, _declines_joined, codec, DOWN)
    back = "lora_linear_backward"
    add(back, "triton_dx", backward_dx, _declines_codes, DOWN, over, "lora_linear_dx")
    add(back, "triton_low_rank", backward_low_rank, _declines_low_rank, codec, DOWN, over)
    add(back, "summed_gemm", backward_summed, _declines_summed, codec, DOWN, over, UP)
