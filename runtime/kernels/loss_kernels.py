"""The candidates for `linear_cross_entropy`: which part of the sweep over the rows (`cross_entropy_sweep.py`) is generated.

    fused_softmax   the library's logits in bf16; losses and the logits' gradient by one generated kernel over their rows
    fused_fp32      logits and their products by the generated fp32 GEMM, softmax by torch
    library_gemm    the library's products, in fp32 where the CPU multiplies nothing narrower; softmax by torch

`run(device type)` gives the kernel that the sweep calls. Nothing is timed: the first that covers a loss won wherever it was
measured (`benchmarks/train_step.py`, `benchmarks/gpu.py`).
"""

from __future__ import annotations

import torch

from ...cross_entropy_sweep import FUSED, LIBRARY, SOFTMAX
from . import cpp_build, cpu_gemm, devices
from .dispatch import Candidate, Problem, register
from .lora_kernels import declines_gemm, prefers_fused

OP, SWEEP = "linear_cross_entropy", "cross_entropy"


def _find_softmax(device: str) -> object:
    from . import find

    return find(SWEEP, device)


def _declines_softmax(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16:
        return "for bf16 only"
    if problem.device != "cpu":
        return None if _find_softmax(problem.device) is not None else f"the kernel {SWEEP} does not work here"
    if not devices.has_avx512_bf16():
        return "this machine has no AVX-512 BF16"
    return None if cpp_build.find_compiler() is not None else "there is no C++ compiler"


register(Candidate(OP, SOFTMAX, _find_softmax, ("cpu", "cuda"), _declines_softmax, kernels=(SWEEP,)))
register(
    Candidate(OP, FUSED, lambda device: cpu_gemm.wide_gemm, ("cpu",), declines_gemm, prefers_fused, ("wide_gemm",))
)
register(Candidate(OP, LIBRARY, lambda device: None))
