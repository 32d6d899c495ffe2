"""The C++ sweep over pages of optimizer state as a Python function."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import dynamic_map
from . import cpp_build

_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
PIECE_FIELDS = 6  # struct Piece of paged_step.cpp.jinja
NUMBERS = 8  # struct Numbers


@functools.cache
def code_entries(signed: bool) -> tuple[Tensor, Tensor]:
    """-> the map's values [256], and the table [65536] of struct Maps in paged_step.cpp.jinja (as int32)."""
    values = dynamic_map(signed)
    bounds = (values[:-1] + values[1:]) / 2
    upper = torch.arange(65536, dtype=torch.int32, device="cpu") << 16
    ends = torch.stack([upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)])
    ends = ends.where(ends.isfinite(), torch.ones(()))
    below, above = torch.bucketize(ends.amin(0), bounds), torch.bucketize(ends.amax(0), bounds)
    assert bool((above - below <= 1).all())
    bits = bounds[below.clamp(max=254)].contiguous().view(torch.int32)
    # Lower 16 bits count towards zero for negative numbers; past the bound are those above it.
    at = torch.where(bits < 0, ~bits, bits) & 0xFFFF
    past = torch.where(above > below, 0xFFFF - at, torch.zeros_like(at))
    return values, (below.int() << 16) + past


def make_paged_step() -> Callable[..., None]:
    """Builds the kernel and returns `paged_step`. Raises KernelError."""
    kernel = cpp_build.load("paged_step").qlora_paged_step
    kernel.argtypes = (_pointer, _int64, _pointer, *[_pointer] * 4, *[_int] * 4)
    kernel.restype = None
    maps = [*code_entries(True), *code_entries(False)]

    def paged_step(pieces: Tensor, numbers: Tensor, lion: bool, narrow: bool, isa: str = "auto") -> None:
        """Update the parameters and states that `pieces` (int64 [P, 6]) points at, with rows of `numbers` (fp32 [G, 8])."""
        if pieces.dtype != torch.int64 or pieces.shape[1:] != (PIECE_FIELDS,) or not pieces.is_contiguous():
            raise KernelError(
                f"pieces must be contiguous int64 [P, {PIECE_FIELDS}], got {pieces.dtype} {[*pieces.shape]}."
            )
        if numbers.dtype != torch.float32 or numbers.shape[1:] != (NUMBERS,) or not numbers.is_contiguous():
            raise KernelError(
                f"numbers must be contiguous fp32 [G, {NUMBERS}], got {numbers.dtype} {[*numbers.shape]}."
            )
        isas = cpp_build.instruction_sets()
        number = -1 if isa == "auto" else len(isas) - 1 - isas.index(isa)
        kernel(
            *(pieces.data_ptr(), pieces.shape[0], numbers.data_ptr(), *(m.data_ptr() for m in maps)),
            *(int(lion), int(narrow), number, torch.get_num_threads()),
        )

    return paged_step
