"""The C++ kernels of the CPU as Python functions on tensors. Sizes and types are checked here, once, before C reads.

M, N, K: rows of x, rows of the weight, columns of the weight. nb: number of blocks of the weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import CODE_BOOKS, QuantizedData, check_format, dynamic_map, pack_scales
from . import cpp_build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.cpp.jinja
_QUANT_TYPES = {name: i for i, name in enumerate(CODE_BOOKS)}
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


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        form = "contiguous" if tensor.is_contiguous() else "strided"
        raise KernelError(
            f"{name} must be a contiguous {wanted} CPU tensor, got a {form} {tensor.dtype} on {tensor.device}."
        )
    if tensor.numel() < numel:
        raise KernelError(f"{name} holds {tensor.numel()} elements, the weight needs {numel}.")


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
    kernel = _bind("dequantize_4bit", *[_pointer] * 6, _int64, _int64, *[_int] * 4)
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
            *(scale_map.data_ptr(), out.data_ptr(), numel, block_size, _QUANT_TYPES[quant_type]),
            *(DTYPES[out.dtype], _isa_number(isa), torch.get_num_threads()),
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
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-numel // block_size), dtype=torch.float32)
        kernel(
            *(weight.data_ptr(), codes.data_ptr(), absmax.data_ptr(), numel, block_size),
            *(_QUANT_TYPES[quant_type], DTYPES[weight.dtype], _isa_number(isa), torch.get_num_threads()),
        )
        return pack_scales(codes, absmax, double_quant)

    return quantize_4bit


KERNELS: dict[str, Callable[[], Callable[..., Any]]] = {
    "dequantize_4bit": make_dequantize_4bit,
    "quantize_4bit": make_quantize_4bit,
}
