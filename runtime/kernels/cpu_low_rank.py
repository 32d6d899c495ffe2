"""The C++ kernels of LoRA's skinny products as Python functions. One call each: no packing or casting in torch.

M tokens, N output features, K input features, R ranks. Activations are bf16 with contiguous rows and any row stride;
A [R, K] and B [N, R] are the contiguous fp32 (or bf16) parameters, rounded to bf16 where they are read, as `.to` does.
Sums are fp32, each output is rounded once, and no result depends on the number of threads.

They are written for AVX-512 BF16 only: on other machines the makers return None and torch's own products run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import KernelError
from . import cpp_build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum Dtype of common.cpp.jinja
_LIBRARY = {"library": "low_rank", "needs": "avx512_bf16"}
_int, _int64, _pointer, _float = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


def _row_stride(name: str, tensor: Tensor, rows: int, columns: int) -> int:
    """The row stride of an activation, once it is known to be bf16 [rows, columns] with contiguous rows on the CPU."""
    if tensor.dtype is not torch.bfloat16 or tensor.shape != (rows, columns) or not tensor.is_cpu:
        raise KernelError(
            f"{name} must be a bfloat16 [{rows}, {columns}] CPU tensor, got {tensor.dtype} {[*tensor.shape]} "
            f"on {tensor.device}."
        )
    row, column = tensor.stride()
    if column != 1 and columns > 1:
        raise KernelError(f"{name} must have contiguous rows, its columns are {column} elements apart.")
    return row


def _factor_dtype(name: str, tensor: Tensor, rows: int, columns: int) -> int:
    """The dtype number of A, B or a gradient of theirs, once it is known to be a contiguous [rows, columns]."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None or tensor.shape != (rows, columns) or not tensor.is_cpu or not tensor.is_contiguous():
        raise KernelError(
            f"{name} must be a contiguous float32 or bfloat16 [{rows}, {columns}] CPU tensor, "
            f"got {tensor.dtype} {[*tensor.shape]} on {tensor.device}."
        )
    return dtype


def make_lora_down() -> Callable[..., None] | None:
    """Builds the library and returns `lora_down`; None on a machine without AVX-512 BF16. Raises KernelError."""
    kernel = cpp_build.bind("lora_down", _pointer, *[_int64] * 3, _pointer, _int64, _pointer, _int, **_LIBRARY)
    if kernel is None:
        return None

    def lora_down(x: Tensor, lora_a: Sequence[Tensor], out: Tensor) -> None:
        """out [M, sum R] = x [M, K] [A_0; A_1; ...]^T. `out` is contiguous."""
        m, k = x.shape
        x_stride = _row_stride("x", x, m, k)
        factors: list[int] = []
        total = 0
        for a in lora_a:
            rank = a.shape[0]
            factors += (a.data_ptr(), rank, _factor_dtype("lora_a", a, rank, k))
            total += rank
        if _row_stride("out", out, m, total) != total and m > 1:
            raise KernelError("out must be contiguous.")
        table = (_int64 * len(factors))(*factors)
        kernel(x.data_ptr(), x_stride, m, k, table, len(lora_a), out.data_ptr(), torch.get_num_threads())

    return lora_down


def make_lora_up() -> Callable[..., None] | None:
    """Builds the library and returns `lora_up`; None on a machine without AVX-512 BF16. Raises KernelError."""
    kernel = cpp_build.bind(
        "lora_up", _pointer, _int64, _pointer, _int, _float, _pointer, *[_int64] * 3, _int, _int, **_LIBRARY
    )
    if kernel is None:
        return None

    def lora_up(h: Tensor, lora_b: Tensor, scale: float, y: Tensor, add: bool = True) -> None:
        """y [M, N] += scale h [M, R] B^T, the old y within the fp32 sum; `add=False` overwrites it. `y` is contiguous."""
        (m, n), rank = y.shape, h.shape[1]
        h_stride = _row_stride("h", h, m, rank)
        dtype = _factor_dtype("lora_b", lora_b, n, rank)
        if _row_stride("y", y, m, n) != n and m > 1:
            raise KernelError("y must be contiguous.")
        threads = torch.get_num_threads()
        kernel(h.data_ptr(), h_stride, lora_b.data_ptr(), dtype, scale, y.data_ptr(), m, n, rank, add, threads)

    return lora_up


def make_lora_backward() -> Callable[..., None] | None:
    """Builds the library and returns `lora_backward`; None on a machine without AVX-512 BF16. Raises KernelError."""
    activation, factor = (_pointer, _int64), (_pointer, _int)
    types = (*activation * 3, *factor, _float, *activation, *factor * 2, *[_int64] * 4, _int)
    kernel = cpp_build.bind("lora_backward", *types, **_LIBRARY)
    if kernel is None:
        return None

    def lora_backward(
        dy: Tensor, x: Tensor, h: Tensor, lora_b: Tensor, scale: float, g: Tensor, da: Tensor | None, db: Tensor | None
    ) -> None:
        """g [M, R] = scale dy [M, N] B;  dA [R, K] = g^T x [M, K];  dB [N, R] = scale dy^T h; None: not wanted."""
        (m, n), k, rank = dy.shape, x.shape[1], h.shape[1]
        a_dtype = 0 if da is None else _factor_dtype("da", da, rank, k)
        b_dtype = 0 if db is None else _factor_dtype("db", db, n, rank)
        kernel(
            *(dy.data_ptr(), _row_stride("dy", dy, m, n), x.data_ptr(), _row_stride("x", x, m, k)),
            *(h.data_ptr(), _row_stride("h", h, m, rank)),
            *(lora_b.data_ptr(), _factor_dtype("lora_b", lora_b, n, rank), scale),
            *(g.data_ptr(), _row_stride("g", g, m, rank)),
            *(None if da is None else da.data_ptr(), a_dtype, None if db is None else db.data_ptr(), b_dtype),
            *(m, n, k, rank, torch.get_num_threads()),
        )

    return lora_backward
