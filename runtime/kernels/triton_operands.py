"""What the kernels that read 4-bit codes are given: weights and adapters, checked, and as a launch's arguments.

M rows of x, N rows and K columns of a weight, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import QuantizedData, check_format
from .checks import check, check_scales
from .triton_common import DTYPES, scale_arguments
from .triton_launch import TENSOR

SMALLEST_CHUNK = 32  # columns: 16 bytes of codes, one access


@dataclass(frozen=True)
class Weight:
    """One 4-bit weight [N, K] as the kernels read it."""

    data: QuantizedData
    rows: int
    columns: int
    quant_type: str
    block_size: int

    def arguments(self) -> list[Tensor]:
        """Codes, which are read as words of four bytes, and scales. A slice of a gathered buffer (FSDP2) may begin between
        two words: that one is copied."""
        codes = self.data.codes
        return [codes if codes.data_ptr() % 4 == 0 else codes.clone(), *scale_arguments(*self.data[1:])]

    def check(self, device: torch.device) -> None:
        """Raises KernelError unless the tensors hold this weight and lie on the device."""
        check_format(self.quant_type, self.block_size)
        numel = self.rows * self.columns
        check("codes", self.data.codes, (torch.uint8,), numel // 2, device)
        check_scales(*self.data[1:], -(-numel // self.block_size), device)
        reason = declined(self.columns, self.block_size)
        if reason is not None:
            raise KernelError(reason)


@dataclass(frozen=True)
class Adapter:
    """One adapter of a linear: h [M, R] (or g), its factor (B [N, R], or A [R, K] for dx), alpha and scaling."""

    low: Tensor
    factor: Tensor
    alpha: float = 1.0
    scaling: Tensor | None = None


@dataclass(frozen=True)
class VectorAdapter:
    """One adapter of a linear for `lora_linear_vector`: A [R, K] of any strides, B [N, R], alpha and scaling."""

    down: Tensor
    up: Tensor
    alpha: float = 1.0
    scaling: Tensor | None = None


def chunk_of(columns: int, block_size: int, most: int) -> int:
    """Columns read under one scale: the largest power of two, at most `most`, that divides the block size and K."""
    return min(columns & -columns, block_size, most) if columns else most


def declined(columns: int, block_size: int) -> str | None:
    """Why a weight with so many columns cannot be read straight from its codes, or None if it can."""
    if chunk_of(columns, block_size, SMALLEST_CHUNK) < SMALLEST_CHUNK:
        return f"rows of {columns} columns do not begin at 16 bytes of codes: K must be a multiple of {SMALLEST_CHUNK}."
    return None


def check_activation(name: str, tensor: Tensor, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dim() != 2 or tensor.shape[1] != columns or tensor.dtype != dtype or tensor.device != device:
        raise KernelError(
            f"{name} must be a {dtype} [M, {columns}] tensor on {device}, "
            f"got {tensor.dtype} {[*tensor.shape]} on {tensor.device}."
        )
    if dtype not in DTYPES or (tensor.stride(1) != 1 and columns > 1):
        raise KernelError(f"{name} must be float32, bfloat16 or float16 with contiguous rows.")


def check_adapters(adapters: Sequence[Adapter], rows: int, columns: int, x: Tensor) -> None:
    """factor [rows, columns] with one of them None-like (0): the rank."""
    for adapter in adapters:
        rank = adapter.low.shape[1]
        shape = (rows or rank, columns or rank)
        check_activation("h", adapter.low, rank, x.dtype, x.device)
        check("an adapter's factor", adapter.factor, DTYPES, 0, x.device)
        if adapter.factor.shape != shape or adapter.low.shape[0] != x.shape[0]:
            raise KernelError(f"A factor of shape {[*adapter.factor.shape]} does not fit: {[*shape]} is needed.")


def check_factor(name: str, factor: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Of any strides."""
    if factor.shape != shape or factor.dtype not in DTYPES or factor.device != device:
        raise KernelError(
            f"{name} must be a floating {[*shape]} tensor on {device}, "
            f"got {factor.dtype} {[*factor.shape]} on {factor.device}."
        )


def rank_arguments(adapter: Adapter | VectorAdapter) -> list[Any]:
    """B, alpha and scaling of an adapter among a launch's arguments."""
    return [TENSOR, adapter.alpha, *([] if adapter.scaling is None else [TENSOR])]


def spec_of(weight: Weight, given: Sequence[Adapter], **more: Any) -> dict[str, Any]:
    scaling = bool(given) and given[0].scaling is not None
    return {
        "quant_type": weight.quant_type,
        "double_quant": weight.data.absmax_scale is not None,
        "scaling": scaling,
        "uses_tiles": True,
        **more,
    }


def numbers_of(weight: Weight) -> tuple[Any, ...]:
    """What a launch depends on besides the form of a weight's tensors."""
    return weight.rows, weight.columns, weight.quant_type, weight.block_size
