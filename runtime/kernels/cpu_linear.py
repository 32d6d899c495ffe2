"""The C++ products of a few rows with a 4-bit weight, straight from its codes, as Python objects on tensors.

There are two: `linear_4bit_small` multiplies in bf16, written for AVX-512 BF16 only; `wide_linear_4bit_small` in fp32 on any
machine. M rows of x, N output features, K input features, R the rank of one adapter.
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
from . import cpp_build
from .checks import check, check_scales
from .cpu_common import DTYPES, QUANT_TYPES, isa_number

_BF16 = {torch.bfloat16: DTYPES[torch.bfloat16]}


class Adapter(NamedTuple):
    """A [R, K] and B [N, R] (contiguous, fp32 or bf16), and what multiplies them: alpha, and a 0-dim fp32 tensor or None."""

    a: Tensor
    b: Tensor
    alpha: float = 1.0
    scaling: Tensor | None = None


class SmallLinear:
    """y = x W^T + bias + sum_j alpha_j scaling_j (x A_j^T) B_j^T for a few rows of x, in one C call with one rounding.

    Made once for a weight and its adapters: everything but x is checked here. A call reads pointers only, so tensors may
    be written and their storage replaced in between, but not their shapes, dtypes and strides. wide: the product in fp32,
    else in bf16.
    """

    def __init__(
        self,
        data: Sequence[Tensor | None],
        shape: tuple[int, int],
        quant_type: str,
        block_size: int,
        bias: Tensor | None = None,
        adapters: Sequence[Adapter] = (),
        out_dtype: torch.dtype = torch.bfloat16,
        wide: bool = False,
        isa: str = "auto",
    ) -> None:
        codes, absmax, absmax_scale, absmax_offset = data
        n, k = shape
        check_format(quant_type, block_size)
        if k % block_size:
            raise KernelError(f"linear_4bit_small needs whole blocks in each row: {k} is no multiple of {block_size}.")
        assert codes is not None and absmax is not None
        check("codes", codes, (torch.uint8,), n * k // 2)
        check_scales(absmax, absmax_scale, absmax_offset, n * k // block_size)
        if bias is not None:
            check("bias", bias, (torch.float32, torch.bfloat16), n)
        for adapter in adapters:
            _check_adapter(adapter, n, k)
        kernel = _wide_function() if wide else _function()
        if kernel is None:
            raise KernelError("linear_4bit_small needs AVX-512 BF16, which this machine has not.")
        self._kernel, self.shape, self.out_dtype = kernel, shape, out_dtype
        self._dtypes, self._isa = (DTYPES, [isa_number(isa)]) if wide else (_BF16, [])
        weights = (codes, absmax, absmax_scale, absmax_offset, dynamic_map(), bias)
        tables = [t for adapter in adapters for t in (adapter.a, adapter.b, adapter.scaling)]
        self._weights = [_pointer(t) for t in weights]
        self._tables = [_pointer(t) for t in tables]
        bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
        self._numbers = n, k, block_size, QUANT_TYPES[quant_type], DTYPES[out_dtype], bias_dtype, len(adapters)
        self._factors: list[float] = []
        for a, b, alpha, _ in adapters:
            self._factors += [DTYPES[a.dtype], DTYPES[b.dtype], a.shape[0], alpha]
        self._pack = struct.Struct(f"=21q{3 * len(adapters)}q" + "3qd" * len(adapters)).pack

    def __call__(self, x: Tensor, out: Tensor, h: Tensor | None = None) -> None:
        """x [M, K] with contiguous rows -> out [M, N] contiguous; h [M, sum R] of x's dtype, contiguous rows, if wanted.

        x is bf16; wide: fp32, bf16 or fp16.
        """
        dtype = self._dtypes.get(x.dtype)
        if not x.is_cpu or dtype is None or x.dim() != 2 or x.shape[1] != self.shape[1]:
            names = " or ".join(str(d).removeprefix("torch.") for d in self._dtypes)
            raise KernelError(
                f"x must be a {names} [M, {self.shape[1]}] CPU tensor with contiguous rows, got {x.dtype} {[*x.shape]}."
            )
        m, (row, column) = x.shape[0], x.stride()
        if column != 1:
            raise KernelError(f"x must have contiguous rows, its columns are {column} elements apart.")
        if h is not None and h.dtype is not x.dtype:
            raise KernelError(f"h must have x's dtype {x.dtype}, got {h.dtype}.")
        columns = (0, 0) if h is None else (h.data_ptr(), h.stride(0))
        self._kernel(
            self._pack(
                *(x.data_ptr(), row, *columns, out.data_ptr(), m, torch.get_num_threads(), dtype),
                *[pointer() for pointer in self._weights],
                *self._numbers,
                *[pointer() for pointer in self._tables],
                *self._factors,
            ),
            *self._isa,
        )


def _pointer(tensor: Tensor | None) -> Callable[[], int]:
    return _null if tensor is None else tensor.data_ptr


def _null() -> int:
    return 0


def _check_adapter(adapter: Adapter, n: int, k: int) -> None:
    a, b, _, scaling = adapter
    rank = a.shape[0]
    check("lora_a", a, (torch.float32, torch.bfloat16), rank * k, who="the adapter")
    check("lora_b", b, (torch.float32, torch.bfloat16), n * rank, who="the adapter")
    if a.shape != (rank, k) or b.shape != (n, rank):
        raise KernelError(f"A {[*a.shape]} and B {[*b.shape]} are no adapter of a weight [{n}, {k}].")
    if scaling is not None:
        check("scaling", scaling, (torch.float32,), 1, who="the adapter")


def declines_small(dtype: torch.dtype) -> str | None:
    """Why `linear_4bit_small` cannot run here, or None."""
    if dtype not in _BF16:
        return "for bf16 only"
    return None if _function() is not None else "this machine has no AVX-512 BF16"


@functools.cache
def _function() -> Any:
    """The C function, built on first use; None on a machine without AVX-512 BF16. Raises KernelError."""
    return cpp_build.bind("linear_4bit_small", ctypes.c_char_p, needs="avx512_bf16")


@functools.cache
def _wide_function() -> Any:
    """The C function of the fp32 product, built on first use. Raises KernelError."""
    return cpp_build.bind("wide_linear_4bit_small", ctypes.c_char_p, ctypes.c_int)


def make_linear_4bit_small() -> Callable[..., None] | None:
    """Builds the kernel and returns `linear_4bit_small`; None on a machine without AVX-512 BF16. Raises KernelError."""
    return None if _function() is None else linear_4bit_small


def make_wide_linear_4bit_small() -> Callable[..., None]:
    """Builds the kernel and returns `linear_4bit_small` with `wide`. Raises KernelError."""
    _wide_function()
    return functools.partial(linear_4bit_small, wide=True)


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
    bias: Tensor | None = None,
    adapters: Sequence[Adapter] = (),
    h: Tensor | None = None,
    wide: bool = False,
    isa: str = "auto",
) -> None:
    """out [M, N] = x [M, K] (rows contiguous) W^T + bias + adapters, straight from W's codes [N, K], for few rows.

    Meant for M of at most 64 (wide: 16); right for any M. Needs K % block_size == 0. Sums are fp32 with one rounding. x is
    bf16 and out bf16 or fp32, and a weight is bf16(book value) * fp32 scale, so it differs from the dequantized bf16 weight
    by about its rounding. wide: x and out are fp32, bf16 or fp16, weights are what dequantizing to fp32 gives, and `isa`
    holds the kernel to an instruction set. `h` [M, sum R] of x's dtype gets the x A_j^T side by side.
    """
    data = codes, absmax, absmax_scale, absmax_offset
    call = SmallLinear(data, (N, K), quant_type, block_size, bias, adapters, out.dtype, wide, isa)
    check("out", out, tuple(DTYPES) if wide else (torch.float32, torch.bfloat16), x.shape[0] * N, who="the product")
    call(x, out, h)
