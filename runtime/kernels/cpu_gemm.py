"""The generated fp32 GEMM, for CPUs that multiply nothing narrower, as a Python function on tensors.

It reads fp32, bf16 and fp16 matrices and 4-bit codes and writes any of the three dtypes, so nothing is dequantized, cast or
copied around it, and a low-rank product is one more term of the same sum. M, N: rows and columns of the result, K: what a
term sums over.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import check_format, dynamic_map
from . import cpp_build, devices
from .checks import check, check_scales
from .cpu_common import DTYPES, QUANT_TYPES, isa_number

_CODES = -1  # of wide_gemm.cpp.jinja
_CALL, _TERM = "10q", "15qd"


class Codes(NamedTuple):
    """W [rows, columns] in 4 bits, columns % block_size == 0; `transposed`: its transpose is meant."""

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    rows: int
    columns: int
    quant_type: str
    block_size: int
    transposed: bool = False

    def t(self) -> Codes:
        return self._replace(transposed=not self.transposed)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


class Term(NamedTuple):
    """factor * left [M, K] @ right [K, N]. Dense: fp32, bf16 or fp16, and contiguous along one dimension."""

    left: Tensor
    right: Tensor | Codes
    factor: float = 1.0


@functools.cache
def _function() -> Any:
    """The C function, built on first use; None on a machine without AVX2. Raises KernelError."""
    return cpp_build.bind("wide_gemm", ctypes.c_char_p, ctypes.c_int, needs="avx2")


def is_preferred() -> bool:
    """Where fp32 is the narrowest that this CPU multiplies: what it saves is dequantizing, casts and their memory."""
    return devices.kind("cpu") in ("cpu-avx2", "cpu-avx512")


def declines() -> str | None:
    """Why `wide_gemm` cannot run here, or None. Builds nothing."""
    if cpp_build.find_compiler() is None:
        return "there is no C++ compiler"
    return None if devices.has_avx2() else "this machine has no AVX2"


def make_wide_gemm() -> Callable[..., None] | None:
    """Builds the kernel and returns `wide_gemm`, where it is preferred; else None. Raises KernelError."""
    return wide_gemm if is_preferred() and _function() is not None else None


def wide_gemm(terms: Sequence[Term], out: Tensor, bias: Tensor | None = None, isa: str = "auto") -> None:
    """out [M, N] = the sum of the terms + bias [N], products and sums in fp32, rounded once to out's dtype.

    `out` is contiguous along one dimension, and shares no memory with what is read. No result depends on the number of
    threads. isa: "avx512" or "avx2", by default the best here. Raises KernelError for what does not fit.
    """
    function = _function()
    if function is None:
        raise KernelError("wide_gemm needs AVX2, which this machine has not.")
    m, n = out.shape
    bias_dtype = 0
    if bias is not None:
        check("bias", bias, tuple(DTYPES), n, who="the product")
        bias_dtype = DTYPES[bias.dtype]
    words = [
        *_matrix("out", out, m, n),
        0 if bias is None else bias.data_ptr(),
        bias_dtype,
        m,
        n,
        torch.get_num_threads(),
    ]
    words.append(len(terms))
    for left, right, factor in terms:
        k = left.shape[1]
        words += _matrix("left", left, m, k)
        words += _codes(right, k, n) if isinstance(right, Codes) else (*_matrix("right", right, k, n), *[0] * 4, 0, 1)
        words += k, factor
    function(struct.pack(f"={_CALL}" + _TERM * len(terms), *words), isa_number(isa))


def readable(t: Tensor) -> Tensor:
    """A vector or a matrix as the product takes it: mostly the tensor itself."""
    t = t if t.dtype in DTYPES else t.float()
    return t if t.dim() == 1 or 1 in t.stride() else t.contiguous()


def _matrix(name: str, tensor: Tensor, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides, once they are known to be right; one of the strides is 1."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None or tensor.shape != (rows, columns) or not tensor.is_cpu:
        raise KernelError(
            f"{name} must be a float32, bfloat16 or float16 [{rows}, {columns}] CPU tensor, got {tensor.dtype} "
            f"{[*tensor.shape]} on {tensor.device}."
        )
    row, column = tensor.stride()
    if columns == 1 or rows == 1:  # strides of what is alone say nothing
        row, column = (row, 1) if columns == 1 else (1, column) if column != 1 else (columns, 1)
    if 1 not in (row, column):
        raise KernelError(f"{name} must be contiguous along one dimension, its strides are {tensor.stride()}.")
    return tensor.data_ptr(), dtype, row, column


def _codes(w: Codes, k: int, n: int) -> tuple[int, ...]:
    check_format(w.quant_type, w.block_size)
    if w.shape != (k, n):
        raise KernelError(f"right must be [{k}, {n}], got codes of {[*w.shape]}.")
    if w.columns % w.block_size:
        raise KernelError(f"wide_gemm needs whole blocks in each row: {w.columns} is no multiple of {w.block_size}.")
    check("codes", w.codes, (torch.uint8,), w.rows * w.columns // 2)
    check_scales(w.absmax, w.absmax_scale, w.absmax_offset, w.rows * w.columns // w.block_size)
    strides = (1, w.columns) if w.transposed else (w.columns, 1)
    scales = (0 if t is None else t.data_ptr() for t in (w.absmax, w.absmax_scale, w.absmax_offset))
    numbers = QUANT_TYPES[w.quant_type], w.block_size
    return w.codes.data_ptr(), _CODES, *strides, *scales, dynamic_map().data_ptr(), *numbers
