"""The candidates for `lora_linear` and its backward on a GPU: Triton kernels over one group.

    triton_vector      up to 4 rows: one launch for the whole group, straight from the codes
    triton_gemm        a GEMM for each linear, decoded between load and product; K divided over programs for few rows
    triton_dx          backward: dX of the group as one sum straight from the codes, low-rank products in Triton
    triton_low_rank    the weight dequantized once, the library's GEMM, low-rank products in Triton
    joined_gemm        the weight dequantized beside its adapters' B: the library's GEMM over K + R, no pass over y

None is preferred: where no measurement speaks (a shipped table, `autotune=True`), the library's GEMM on the dequantized
weight runs. M rows of x, N output and K input features, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...lora_gradients import grad_x
from ...lora_group import LoRAGroup, scratch, split_ranks
from ...nf4 import QuantizedData
from . import dispatch, triton_linear, triton_low_rank, triton_operands
from .dispatch import Candidate, Problem
from .triton_low_rank import Dropout, Scale
from .triton_operands import Adapter, Weight


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
    m = x.shape[0]
    outs = [x.new_empty((m, n)) for n in group.out_features]
    if not m:
        return outs, x.new_empty((m, sum(group.ranks())))
    h = low_rank(group, x)
    weights, adapters = [_weight(group, i, x.shape[1]) for i in range(len(outs))], _adapters(group, h)
    triton_linear.lora_linear_vector(x, weights, outs, h, adapters, bias)
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
    low = x.new_empty((x.shape[0], sum(ranks)))
    g, parts = list(split_ranks(group, low)), split_ranks(group, h)
    da = [torch.empty_like(a) for a in group.lora_a] if need_adapters else []
    db = [torch.empty_like(b) for b in group.lora_b] if need_adapters else []
    for dy, own in zip(dys, group.adapters_of(), strict=True):
        for part in _launches(ranks[own.start : own.stop]):
            mine = own[part]
            scale, columns = _scale(group, mine), _columns(low, ranks, slice(mine.start, mine.stop))
            triton_low_rank.lora_down(dy, [group.lora_b[j].t() for j in mine], columns, scale)
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


def _declines_joined(problem: Problem) -> str | None:
    if problem.quant_type != "none" and problem.k % problem.block_size:
        return f"K is no multiple of the block of {problem.block_size}"
    return f"for more than {MOST_FEW} rows" if problem.m <= MOST_FEW else _declines_low_rank(problem)


def _declines_vector(problem: Problem) -> str | None:
    most = triton_linear.MOST_VECTOR_ROWS
    return f"for at most {most} rows" if problem.m > most else _declines_codes(problem)


def _never(problem: Problem) -> bool:
    """No table speaks: not by itself."""
    return False


MOST_FEW = 64  # rows up to which reading the codes wins everywhere
CODES, DOWN, UP = "lora_linear_gemm", "lora_down", "lora_up"


def register() -> None:
    """Adds the candidates; where Triton is installed."""
    for name, run, declines, kernels in (
        ("triton_vector", forward_vector, _declines_vector, (DOWN, "lora_linear_small")),
        ("triton_gemm", forward_gemm, _declines_codes, (DOWN, CODES)),
        ("triton_low_rank", forward_low_rank, _declines_low_rank, ("dequantize_4bit", DOWN, UP)),
        ("joined_gemm", forward_joined, _declines_joined, ("dequantize_4bit", DOWN)),
    ):
        dispatch.register(Candidate("lora_linear", name, run, ("cuda",), declines, _never, kernels))
    over = "lora_over_tokens"
    for name, run_back, declines, kernels in (
        ("triton_dx", backward_dx, _declines_codes, (DOWN, over, "lora_linear_dx")),
        ("triton_low_rank", backward_low_rank, _declines_low_rank, ("dequantize_4bit", DOWN, over)),
    ):
        dispatch.register(Candidate("lora_linear_backward", name, run_back, ("cuda",), declines, _never, kernels))
