"""The candidates for `lora_linear` and its backward that are no Triton: from the codes, fp32 GEMM, library GEMM; and for
the dense products that stay in the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import wide_ops
from ...lora_gradients import backward
from ...lora_group import LoRAGroup, forward
from . import cpp_build, cpu_gemm, cpu_linear, devices, dispatch, fp32_linear, fused_linear
from .cpu_common import DTYPES
from .cpu_linear import Adapter, SmallLinear
from .dispatch import Candidate, Problem

SMALL_M, SMALL_WIDE_M = 64, 16  # above it dequantizing once is cheaper


def _declines_codes(problem: Problem) -> str | None:
    return _declines_from_codes(problem, SMALL_M) or cpu_linear.declines_small(problem.dtype)


def _declines_codes_fp32(problem: Problem) -> str | None:
    return _declines_from_codes(problem, SMALL_WIDE_M) or (
        None if problem.dtype in DTYPES else "for fp32, bf16 and fp16"
    )


def _declines_from_codes(problem: Problem, most_rows: int) -> str | None:
    if problem.m > most_rows:
        return f"for at most {most_rows} rows"
    if problem.quant_type == "none":
        return "the weight is dense"
    if problem.dropout:
        return "of what adapters drop"
    if problem.k % problem.block_size:
        return f"K is no multiple of the block of {problem.block_size}"
    return None if cpp_build.find_compiler() is not None else "there is no C++ compiler"


def _from_codes(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor], wide: bool = False) -> tuple[list[Tensor], Tensor]:
    calls, ranks = group.kept.get(_kept_name(wide)) or _small_linears(group, x.shape[1], bias, wide)
    m, first = x.shape[0], 0
    h = x.new_empty((m, sum(ranks)))
    outs = []
    for call, n, rank in zip(calls, group.out_features, ranks, strict=True):
        out = x.new_empty((m, n))
        call(x, out, h[:, first:] if rank and first else h)
        outs.append(out)
        first += rank
    return outs, h


def _kept_name(wide: bool) -> str:
    return "codes_fp32" if wide else "codes"


def _small_linears(group: LoRAGroup, k: int, bias: Sequence[Tensor], wide: bool) -> tuple[list[SmallLinear], list[int]]:
    """The C call of each linear, and how many columns of h it writes."""
    double, calls, ranks = bool(group.absmax_scale), list[SmallLinear](), list[int]()
    for i, mine in enumerate(group.adapters_of()):
        scales = (group.absmax_scale[i], group.absmax_offset[i]) if double else (None, None)
        adapters = []
        for j in mine:
            scaling = group.scaling[j].float() if group.scaling else None
            adapters.append(Adapter(_readable(group.lora_a[j]), _readable(group.lora_b[j]), group.alpha[j], scaling))
        data, shape = (group.weight[i], group.absmax[i], *scales), (group.out_features[i], k)
        b = _readable(bias[i]) if bias else None
        calls.append(SmallLinear(data, shape, group.quant_type, group.block_size, b, adapters, group.dtype, wide))
        ranks.append(sum(group.lora_a[j].shape[0] for j in mine))
    read = (*group.lora_a, *group.lora_b, *bias)
    if all(_readable(t) is t for t in read) and all(t.dtype == torch.float32 for t in group.scaling):
        group.kept[_kept_name(wide)] = calls, ranks  # a copy would not follow what is written into the parameter
    return calls, ranks


def _readable(tensor: Tensor) -> Tensor:
    """As the C function takes it: mostly the tensor itself."""
    tensor = tensor if tensor.dtype in (torch.float32, torch.bfloat16) else tensor.to(torch.float32)
    return tensor.contiguous()


def prefers_fp32(problem: Problem) -> bool:
    return not devices.multiplies_natively(problem.dtype)


def prefers_fp32_products(problem: Problem) -> bool:
    """Where generated C++ with fp32 products has nothing faster beside it: the CPU multiplies nothing narrower, or the
    tensors are fp32."""
    return problem.dtype == torch.float32 or prefers_fp32(problem)


def declines_fp32(problem: Problem) -> str | None:
    return "products are in fp32 already" if problem.dtype.itemsize >= 4 else None


def declines_gemm(problem: Problem) -> str | None:
    """What keeps the generated fp32 GEMM from any op."""
    return cpu_gemm.declines() if problem.dtype in DTYPES else "for fp32, bf16 and fp16"


def _declines_fused(problem: Problem) -> str | None:
    if problem.dtype in DTYPES and problem.quant_type != "none" and problem.k % problem.block_size:
        return f"K is no multiple of the block of {problem.block_size}"
    return declines_gemm(problem)


def prefers_fused(problem: Problem) -> bool:
    return cpu_gemm.is_preferred() and prefers_fp32_products(problem)


DEQUANTIZE = ("dequantize_4bit",)
LOW_RANK = ("lora_down",)  # one source for all three

dispatch.register(
    Candidate("lora_linear", "codes", _from_codes, ("cpu",), _declines_codes, kernels=("linear_4bit_small",))
)
_wide = functools.partial(_from_codes, wide=True), ("cpu",), _declines_codes_fp32, prefers_fp32_products
dispatch.register(Candidate("lora_linear", "codes_fp32", *_wide, ("wide_linear_4bit_small",)))
_fused = ("cpu",), _declines_fused, prefers_fused, ("wide_gemm",)
dispatch.register(Candidate("lora_linear", "fused_fp32", fused_linear.lora_forward, *_fused))
dispatch.register(Candidate("lora_linear_backward", "fused_fp32", fused_linear.lora_backward, *_fused))
dispatch.register(
    Candidate("lora_linear", "fp32_gemm", fp32_linear.lora_forward, ("cpu",), declines_fp32, prefers_fp32, DEQUANTIZE)
)
dispatch.register(Candidate("lora_linear", "library_gemm", forward, kernels=(*DEQUANTIZE, *LOW_RANK)))
dispatch.register(
    Candidate(
        "lora_linear_backward", "fp32_gemm", fp32_linear.lora_backward, ("cpu",), declines_fp32, prefers_fp32, DEQUANTIZE
    )
)  # fmt: skip
dispatch.register(Candidate("lora_linear_backward", "library_gemm", backward, kernels=(*DEQUANTIZE, *LOW_RANK)))


def _dense(name: str) -> Callable[..., Tensor]:
    return lambda x, weight, bias: torch.ops.qlora.wide_linear(x, weight, bias, name)  # type: ignore[no-any-return]


def _declines_dense(problem: Problem) -> str | None:
    if not cpu_gemm.is_preferred():
        return "for CPUs that multiply nothing narrower than fp32"
    return declines_fp32(problem) or cpu_gemm.declines()


for _name, _declines, _kernels in (
    (wide_ops.FUSED, _declines_dense, ("wide_gemm",)),
    (wide_ops.LIBRARY, declines_fp32, ()),
):
    dispatch.register(Candidate("dense_linear", _name, _dense(_name), ("cpu",), _declines, prefers_fp32, _kernels))
dispatch.register(Candidate("dense_linear", "library_gemm", torch.nn.functional.linear))
