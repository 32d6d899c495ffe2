"""The C++ kernels of the CPU as Python functions on tensors. Sizes and types are checked here, once, before C reads.

M, N, K: rows of x, rows of the weight, columns of the weight. nb: number of blocks of the weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...nf4 import QuantizedData, check_format, dynamic_map, pack_scales
from . import (
    cpp_build,
    cpu_attention,
    cpu_cross_entropy,
    cpu_gemm,
    cpu_linear,
    cpu_low_rank,
    cpu_paged_step,
    devices,
)
from .checks import check, check_scales
from .cpu_common import DTYPES, QUANT_TYPES, isa_number

# Outputs at least this large are written past the caches: 15-30% faster here from 8 MiB on, slower where they fit.
STREAM_BYTES = 16 << 20
_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def supported_isas() -> tuple[str, ...]:
    """The paths that this machine can run, best first."""
    best = cpp_build.load("dequantize_4bit").qlora_best_isa()
    return tuple(isa for isa in cpp_build.instruction_sets() if isa_number(isa) <= best)


def _data(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def make_dequantize_4bit() -> Callable[..., None]:
    """Builds the kernel and returns `dequantize_4bit`. Raises KernelError."""
    kernel = cpp_build.bind("dequantize_4bit", *[_pointer] * 6, *[_int64] * 3, *[_int] * 4)
    scale_map = dynamic_map()

    def dequantize_4bit(
        codes: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        numel: int,
        quant_type: str,
        block_size: int,
        out: Tensor,
        isa: str = "auto",
    ) -> None:
        """Writes `numel` weights into `out` (contiguous, any shape): bit for bit `nf4.dequantize_reference`."""
        check_format(quant_type, block_size)
        check("codes", codes, (torch.uint8,), (numel + 1) // 2)
        check_scales(absmax, absmax_scale, absmax_offset, -(-numel // block_size))
        check("out", out, tuple(DTYPES), numel)
        kernel(
            *(codes.data_ptr(), absmax.data_ptr(), _data(absmax_scale), _data(absmax_offset)),
            *(scale_map.data_ptr(), out.data_ptr(), numel, block_size, STREAM_BYTES),
            *(QUANT_TYPES[quant_type], DTYPES[out.dtype], isa_number(isa), torch.get_num_threads()),
        )

    return dequantize_4bit


def make_quantize_4bit() -> Callable[..., QuantizedData]:
    """Builds the kernel and returns `quantize_4bit`. Raises KernelError."""
    kernel = cpp_build.bind("quantize_4bit", *[_pointer] * 3, _int64, _int64, *[_int] * 4)

    def quantize_4bit(
        weight: Tensor, quant_type: str, block_size: int, double_quant: bool, isa: str = "auto"
    ) -> QuantizedData:
        """Contiguous weight (fp32, bf16, fp16) -> QuantizedData: the bytes of `nf4.quantize_reference`."""
        check_format(quant_type, block_size)
        check("weight", weight, tuple(DTYPES), 0)
        numel = weight.numel()
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device="cpu")
        kernel(
            *(weight.data_ptr(), codes.data_ptr(), absmax.data_ptr(), numel, block_size),
            *(QUANT_TYPES[quant_type], DTYPES[weight.dtype], isa_number(isa), torch.get_num_threads()),
        )
        return pack_scales(codes, absmax, double_quant)

    return quantize_4bit


KERNELS: dict[str, Callable[[], Callable[..., Any] | None]] = {
    "dequantize_4bit": make_dequantize_4bit,
    "quantize_4bit": make_quantize_4bit,
    "linear_4bit_small": cpu_linear.make_linear_4bit_small,
    "wide_linear_4bit_small": cpu_linear.make_wide_linear_4bit_small,
    "lora_down": cpu_low_rank.make_lora_down,
    "lora_up": cpu_low_rank.make_lora_up,
    "lora_backward": cpu_low_rank.make_lora_backward,
    "attention_forward": cpu_attention.make_attention_forward,
    "attention_backward": cpu_attention.make_attention_backward,
    "wide_attention_forward": cpu_attention.make_wide_attention_forward,
    "wide_attention_backward": cpu_attention.make_wide_attention_backward,
    "cross_entropy": cpu_cross_entropy.make_cross_entropy,
    "paged_step": cpu_paged_step.make_paged_step,
    "wide_gemm": cpu_gemm.make_wide_gemm,
}
# The template of each kernel: one of its own name, except where a library holds several kernels.
_SHARED = {
    **dict.fromkeys(("lora_down", "lora_up", "lora_backward"), "low_rank"),
    **dict.fromkeys(("attention_forward", "attention_backward"), "attention"),
    **dict.fromkeys(("wide_attention_forward", "wide_attention_backward"), "wide_attention"),
}
TEMPLATES = {op: _SHARED.get(op, op) for op in KERNELS}


def expected(dtype: torch.dtype) -> tuple[str, ...]:
    """One kernel of each library that a training step in `dtype` is likely to call on this CPU, in that order."""
    if devices.has_avx512_bf16() and dtype == torch.bfloat16:
        return "dequantize_4bit", "lora_down", "attention_forward"
    wide = ("wide_attention_forward", "wide_gemm") if cpu_gemm.is_preferred() else ()
    return ("dequantize_4bit", *wide)
