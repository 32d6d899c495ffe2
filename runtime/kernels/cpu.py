"""The C++ kernels of the CPU as Python functions on tensors. Sizes and types are checked here, once, before C reads.

M, N, K: rows of x, rows of the weight, columns of the weight. nb: number of blocks of the weight.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import CODE_BOOKS, QuantizedData, check_format, dynamic_map, pack_scales
from . import cpp_build, cpu_attention, cpu_cross_entropy, cpu_low_rank, cpu_paged_step

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.cpp.jinja
_QUANT_TYPES = {name: i for i, name in enumerate(CODE_BOOKS)}
# Outputs at least this large are written past the caches: 15-30% faster here from 8 MiB on, slower where they fit.
STREAM_BYTES = 16 << 20
_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def supported_isas() -> tuple[str, ...]:
    """The paths that this machine can run, best first."""
    best = cpp_build.load("dequantize_4bit").qlora_best_isa()
    return tuple(isa for isa in cpp_build.instruction_sets() if _isa_number(isa) <= best)


def _isa_number(isa: str) -> int:
    if isa == "auto":
        return -1
    isas = cpp_build.instruction_sets()
    if isa not in isas:
        raise KernelError(f"There is no instruction set {isa!r} here: known are auto, {', '.join(isas)}.")
    return len(isas) - 1 - isas.index(isa)


def _bind(op: str, *types: Any) -> Any:
    function = getattr(cpp_build.load(op), f"qlora_{op}")
    function.argtypes, function.restype = types, None
    return function


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int, who: str = "the weight") -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        form = "contiguous" if tensor.is_contiguous() else "strided"
        raise KernelError(
            f"{name} must be a contiguous {wanted} CPU tensor, got a {form} {tensor.dtype} on {tensor.device}."
        )
    if tensor.numel() < numel:
        raise KernelError(f"{name} holds {tensor.numel()} elements, {who} needs {numel}.")


def _check_scales(absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, blocks: int) -> None:
    if (absmax_scale is None) != (absmax_offset is None):
        raise KernelError("absmax_scale and absmax_offset belong together: give both or none.")
    if absmax_scale is None or absmax_offset is None:
        _check("absmax", absmax, (torch.float32,), blocks)
        return
    _check("absmax", absmax, (torch.uint8,), blocks)
    _check("absmax_scale", absmax_scale, (torch.float32,), -(-blocks // 256))
    _check("absmax_offset", absmax_offset, (torch.float32,), 1)


def _data(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def make_dequantize_4bit() -> Callable[..., None]:
    """Builds the kernel and returns `dequantize_4bit`. Raises KernelError."""
    kernel = _bind("dequantize_4bit", *[_pointer] * 6, *[_int64] * 3, *[_int] * 4)
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
        _check("codes", codes, (torch.uint8,), (numel + 1) // 2)
        _check_scales(absmax, absmax_scale, absmax_offset, -(-numel // block_size))
        _check("out", out, tuple(DTYPES), numel)
        kernel(
            *(codes.data_ptr(), absmax.data_ptr(), _data(absmax_scale), _data(absmax_offset)),
            *(scale_map.data_ptr(), out.data_ptr(), numel, block_size, STREAM_BYTES),
            *(_QUANT_TYPES[quant_type], DTYPES[out.dtype], _isa_number(isa), torch.get_num_threads()),
        )

    return dequantize_4bit


def make_quantize_4bit() -> Callable[..., QuantizedData]:
    """Builds the kernel and returns `quantize_4bit`. Raises KernelError."""
    kernel = _bind("quantize_4bit", *[_pointer] * 3, _int64, _int64, *[_int] * 4)

    def quantize_4bit(
        weight: Tensor, quant_type: str, block_size: int, double_quant: bool, isa: str = "auto"
    ) -> QuantizedData:
        """Contiguous weight (fp32, bf16, fp16) -> QuantizedData: the bytes of `nf4.quantize_reference`."""
        check_format(quant_type, block_size)
        _check("weight", weight, tuple(DTYPES), 0)
        numel = weight.numel()
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device="cpu")
        absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device="cpu")
        kernel(
            *(weight.data_ptr(), codes.data_ptr(), absmax.data_ptr(), numel, block_size),
            *(_QUANT_TYPES[quant_type], DTYPES[weight.dtype], _isa_number(isa), torch.get_num_threads()),
        )
        return pack_scales(codes, absmax, double_quant)

    return quantize_4bit


def declines_small(dtype: torch.dtype) -> str | None:
    """Why `linear_4bit_small` cannot run here, or None."""
    if dtype != torch.bfloat16:
        return "for bf16 only"
    return None if make_linear_4bit_small() is not None else "this machine has no AVX-512 BF16"


@functools.cache
def make_linear_4bit_small() -> Callable[..., None] | None:
    """Builds the kernel and returns `linear_4bit_small`; None on a machine without AVX-512 BF16. Raises KernelError."""
    if "avx512" not in cpp_build.instruction_sets():
        return None
    if not cpp_build.load("linear_4bit_small").qlora_has_linear_4bit_small():
        return None
    kernel = _bind("linear_4bit_small", *[_pointer] * 8, *[_int64] * 5, *[_int] * 3)
    scale_map = dynamic_map()

    def linear_4bit_small(
        x: Tensor,
        codes: Tensor,
        absmax: Tensor,
        absmax_scale: Tensor | None,
        absmax_offset: Tensor | None,
        N: int,
        K: int,
        quant_type: str,
        block_size: int,
        out: Tensor,
    ) -> None:
        """out [M, N] (bf16 or fp32) = x [M, K] (bf16, rows contiguous) @ W^T, straight from the codes of W [N, K].

        Meant for M of at most 64; right for any M. Needs K % block_size == 0. Sums are fp32; a weight is
        bf16(book value) * fp32 scale, so it differs from the dequantized bf16 weight by about its rounding.
        """
        check_format(quant_type, block_size)
        if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[1] != K or x.stride(1) != 1 or x.device.type != "cpu":
            raise KernelError(
                f"x must be a bfloat16 [M, {K}] CPU tensor with contiguous rows, got {x.dtype} {[*x.shape]}."
            )
        if K % block_size:
            raise KernelError(f"linear_4bit_small needs whole blocks in each row: {K} is no multiple of {block_size}.")
        M = x.shape[0]
        _check("codes", codes, (torch.uint8,), N * K // 2)
        _check_scales(absmax, absmax_scale, absmax_offset, N * K // block_size)
        _check("out", out, (torch.float32, torch.bfloat16), M * N, "the product")
        planes = torch.empty(M * -(-K // 128) * 128, dtype=torch.bfloat16, device="cpu")
        kernel(
            *(x.data_ptr(), codes.data_ptr(), absmax.data_ptr(), _data(absmax_scale), _data(absmax_offset)),
            *(scale_map.data_ptr(), planes.data_ptr(), out.data_ptr(), M, N, K, x.stride(0), block_size),
            *(_QUANT_TYPES[quant_type], DTYPES[out.dtype], torch.get_num_threads()),
        )

    return linear_4bit_small


KERNELS: dict[str, Callable[[], Callable[..., Any] | None]] = {
    "dequantize_4bit": make_dequantize_4bit,
    "quantize_4bit": make_quantize_4bit,
    "linear_4bit_small": make_linear_4bit_small,
    "lora_down": cpu_low_rank.make_lora_down,
    "lora_up": cpu_low_rank.make_lora_up,
    "lora_backward": cpu_low_rank.make_lora_backward,
    "attention_forward": cpu_attention.make_attention_forward,
    "attention_backward": cpu_attention.make_attention_backward,
    "cross_entropy": cpu_cross_entropy.make_cross_entropy,
    "paged_step": cpu_paged_step.make_paged_step,
}
# The template of each kernel: one of its own name, except where a library holds several kernels.
_SHARED = {"lora": "low_rank", "attention": "attention"}
TEMPLATES = {op: _SHARED.get(op.partition("_")[0], op) for op in KERNELS}
