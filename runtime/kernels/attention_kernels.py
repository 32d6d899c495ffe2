"""The candidates for attention: generated C++ by blocks ("flash"), fp32 with one rounding, the library's.

Each `run` takes (q [B, H, L, D], k, v, mask, causal, scale), gives out and is differentiable; `lower_attention` puts the op
of the chosen one into the graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ... import attention_ops
from . import cpp_build, devices, dispatch
from .dispatch import Candidate, Problem
from .lora_kernels import declines_fp32, prefers_fp32

FEWEST_QUERIES = 16  # lanes of a register: with fewer most of the work is on zeros
LARGEST_HEAD = 512  # a block of queries and its gradient must fit the second-level cache


def _declines_flash(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16:
        return "for bf16 only"
    if problem.m < FEWEST_QUERIES:
        return f"for {FEWEST_QUERIES} queries or more"
    if problem.k > LARGEST_HEAD:
        return f"for heads of at most {LARGEST_HEAD}"
    if cpp_build.find_compiler() is None:
        return "there is no C++ compiler"
    # asked of torch: the kernel itself is built at the first call, or while the graph is traced
    return None if torch.cpu._is_avx512_bf16_supported() else "this machine has no AVX-512 BF16"


def _prefers_flash(problem: Problem) -> bool:
    """By default on AVX-512 BF16 without AMX; where AMX runs the library's products, only a measurement can tell."""
    return devices.kind(problem.device) == "cpu-avx512_bf16"


def _op(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:  # fmt: skip
    return torch.ops.qlora.attention(q, k, v, mask, causal, scale, kernel)[0]  # type: ignore[no-any-return]


def _library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale)


FLASH = functools.partial(_op, attention_ops.FLASH)
KERNELS = ("attention_forward", "attention_backward")
dispatch.register(Candidate("attention", "flash", FLASH, ("cpu",), _declines_flash, _prefers_flash, KERNELS))
dispatch.register(Candidate("attention", "fp32", functools.partial(_op, "fp32"), ("cpu",), declines_fp32, prefers_fp32))
dispatch.register(Candidate("attention", "library", _library))
