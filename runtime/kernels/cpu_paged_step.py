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
from .cpu_common import isa_number

_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
PIECE_FIELDS = 6  # struct Piece of paged_step.cpp.jinja
NUMBERS = 8  # struct Numbers


@functools.cache
def code_map(signed: bool) -> Tensor:
    """`struct Map` of dynamic_codes.cpp.jinja, as the int32 words that it consists of."""
    values = dynamic_map(signed)
    bounds = (values[:-1] + values[1:]) / 2
    raw = values.view(torch.uint8).view(256, 4)
    halves = raw.view(torch.int16).t().contiguous().view(-1)
    planes = raw.t().contiguous().view(-1)
    parts = [values, halves, planes, _entries(bounds), *_decades(signed, bounds[127 if signed else 0 :].tolist())]
    return torch.cat([part.view(torch.int32) for part in parts])


def _entries(bounds: Tensor) -> Tensor:
    """`entry` of `struct Map`, int32 [65536]. What is no number gets the code of 0."""
    upper = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
    below, above = (torch.bucketize(_number_at(place), bounds) for place in (upper, upper | 0xFFFF))
    assert bool((above - below <= 1).all())
    bits = bounds[below.clamp(max=len(bounds) - 1)].view(torch.int32)
    at = torch.where(bits < 0, ~bits, bits) & 0xFFFF
    return (below.int() << 16) + torch.where(above > below, 0xFFFF - at, torch.zeros_like(at))


def _number_at(place: Tensor) -> Tensor:
    """The reverse of `place_of` of dynamic_codes.cpp.jinja, int32 -> fp32, with 0 for what is no number."""
    bits = torch.where(place < 0, place ^ -(1 << 31), ~place)
    return bits.view(torch.float32).nan_to_num(0, torch.inf, -torch.inf)


def _decades(signed: bool, bounds: list[float]) -> tuple[Tensor, ...]:
    """`next`, `slope`, `start` and `most` of `struct Map`; `bounds` are those of magnitudes.

    Seven decades of evenly spaced bounds, the first with all that is below it, and above them one without bounds.
    """
    slope = 1 / (bounds[1] - bounds[0])
    count = 2 if signed else 3
    begins, lines, most = [bounds[count - 1]], [(slope, 1 - bounds[0] * slope)], [count - 1]
    for exponent in range(1, 7):
        steps = 2 ** (exponent + (not signed))
        low = 10.0 ** (exponent - 7)
        step = 9 * low / steps
        lines.append((1 / step, count - low / step))
        count += steps
        most.append(count - 1)
        begins.append(bounds[count - 1])
    begins += [torch.inf] * 9
    lines += [(0.0, count + 0.5)] * 9
    most += [count] * 9
    table = torch.tensor(lines, dtype=torch.float64, device="cpu").t() * 4096
    table[1] += 1
    return (
        torch.tensor(begins, dtype=torch.float32, device="cpu"),
        *table.float().contiguous(),
        torch.tensor(most, dtype=torch.int32, device="cpu"),
    )


def make_paged_step() -> Callable[..., None]:
    """Builds the kernel and returns `paged_step`. Raises KernelError."""
    kernel = cpp_build.bind("paged_step", _pointer, _int64, _pointer, *[_pointer] * 2, *[_int] * 4)
    maps = [code_map(True), code_map(False)]

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
        kernel(
            *(pieces.data_ptr(), pieces.shape[0], numbers.data_ptr(), *(m.data_ptr() for m in maps)),
            *(int(lion), int(narrow), isa_number(isa), torch.get_num_threads()),
        )

    return paged_step
