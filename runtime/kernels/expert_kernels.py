"""The candidates for `grouped_lora_linear` and its backward: one fp32 GEMM from the codes, or the library's products."""

from __future__ import annotations

from ...expert_products import FUSED, library_backward, library_forward
from . import fused_experts
from .dispatch import Candidate, register
from .lora_kernels import DEQUANTIZE, LOW_RANK, declines_gemm, prefers_fused

FORWARD, BACKWARD = "grouped_lora_linear", "grouped_lora_linear_backward"

_fused = ("cpu",), declines_gemm, prefers_fused, ("wide_gemm",)
register(Candidate(FORWARD, FUSED, fused_experts.grouped_forward, *_fused))
register(Candidate(BACKWARD, FUSED, fused_experts.grouped_backward, *_fused))
register(Candidate(FORWARD, "library_gemm", library_forward, kernels=(*DEQUANTIZE, *LOW_RANK)))
register(Candidate(BACKWARD, "library_gemm", library_backward, kernels=(*DEQUANTIZE, *LOW_RANK)))
