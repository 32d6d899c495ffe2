"""The candidates for attention: generated C++ by blocks with products in bf16 ("flash") or fp32 ("flash_fp32"), torch's
products in fp32 ("fp32"), the library's.

Each `run` takes (q [B, H, L, D], k, v, mask, causal, scale), gives out and is differentiable; `lower_attention` puts the op
of the chosen one into the graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import attention_ops
from . import cpp_build, devices, dispatch
from .cpu_common import DTYPES
from .dispatch import Candidate, Problem
from .lora_kernels import declines_fp32, prefers_fp32, prefers_fp32_products

FEWEST_QUERIES = 16  # lanes of a register: with fewer most of the work is on zeros
LARGEST_HEAD = 512  # a block of queries and its gradient must fit the second-level cache


def _declines_blocks(problem: Problem) -> str | None:
    if problem.m < FEWEST_QUERIES:
        return f"for {FEWEST_QUERIES} queries or more"
    if problem.k > LARGEST_HEAD:
        return f"for heads of at most {LARGEST_HEAD}"
    return None if cpp_build.find_compiler() is not None else "there is no C++ compiler"


def _declines_flash(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16:
        return "for bf16 only"
    # the kernel itself is built at the first call, or while the graph is traced
    return _declines_blocks(problem) or (None if devices.has_avx512_bf16() else "this machine has no AVX-512 BF16")


def _prefers_flash(problem: Problem) -> bool:
    """By default on AVX-512 BF16 without AMX; where AMX runs the library's products, only a measurement can tell."""
    return devices.kind(problem.device) == "cpu-avx512_bf16"


def _declines_flash_fp32(problem: Problem) -> str | None:
    return _declines_blocks(problem) if problem.dtype in DTYPES else "for fp32, bf16 and fp16"


def _prefers_flash_fp32(problem: Problem) -> bool:
    """From AVX2 on. The portable path is for those who measure that it gains there."""
    vectors = devices.kind(problem.device) in ("cpu-avx2", "cpu-avx512", "cpu-avx512_bf16", "cpu-amx")
    return vectors and prefers_fp32_products(problem)


def _op(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:  # fmt: skip
    return torch.ops.qlora.attention(q, k, v, mask, causal, scale, kernel)[0]  # type: ignore[no-any-return]


def _library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)


for _name, _declines, _prefers, _prefix in (
    (attention_ops.FLASH, _declines_flash, _prefers_flash, "attention"),
    (attention_ops.FLASH_FP32, _declines_flash_fp32, _prefers_flash_fp32, "wide_attention"),
):
    _kernels = f"{_prefix}_forward", f"{_prefix}_backward"
    dispatch.register(
        Candidate("attention", _name, functools.partial(_op, _name), ("cpu",), _declines, _prefers, _kernels)
    )
dispatch.register(Candidate("attention", "fp32", functools.partial(_op, "fp32"), ("cpu",), declines_fp32, prefers_fp32))
dispatch.register(Candidate("attention", "library", _library))
