"""The candidates for `lora_linear` and its backward that are no Triton: from the codes, fp32 GEMM, library GEMM; and for
the dense products that stay in the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import wide_ops  # noqa: F401  defines its ops
from ...lora_group import LoRAGroup, backward, forward
from . import cpp_build, cpu, devices, dispatch, fp32_linear
from .dispatch import Candidate, Problem

SMALL_M = 64  # above it dequantizing once is cheaper


def _declines_codes(problem: Problem) -> str | None:
    if problem.m > SMALL_M:
        return f"for at most {SMALL_M} rows"
    if problem.quant_type == "none":
        return "the weight is dense"
    if problem.k % problem.block_size:
        return f"K is no multiple of the block of {problem.block_size}"
    if cpp_build.find_compiler() is None:
        return "there is no C++ compiler"
    return cpu.declines_small(problem.dtype)


def _from_codes(group: LoRAGroup, x: Tensor, bias: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    kernel = cpu.KERNELS["linear_4bit_small"]()
    assert kernel is not None

    def product(index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        n, k = group.out_features[index], x.shape[1]
        out = x.new_empty((x.shape[0], n))
        double = bool(group.absmax_scale)
        scales = (group.absmax_scale[index], group.absmax_offset[index]) if double else (None, None)
        kernel(x, group.weight[index], group.absmax[index], *scales, n, k, group.quant_type, group.block_size, out)
        return out if bias is None else out.add_(bias)

    return forward(group, x, bias, product)


def prefers_fp32(problem: Problem) -> bool:
    return not devices.multiplies_natively(problem.dtype)


def declines_fp32(problem: Problem) -> str | None:
    return "products are in fp32 already" if problem.dtype.itemsize >= 4 else None


DEQUANTIZE = ("dequantize_4bit",)
LOW_RANK = ("lora_down",)  # one source for all three

dispatch.register(
    Candidate("lora_linear", "codes", _from_codes, ("cpu",), _declines_codes, kernels=("linear_4bit_small", *LOW_RANK))
)
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
wide_linear = torch.ops.qlora.wide_linear.default
dispatch.register(Candidate("dense_linear", "fp32_gemm", wide_linear, ("cpu",), declines_fp32, prefers_fp32))
dispatch.register(Candidate("dense_linear", "library_gemm", torch.nn.functional.linear))
