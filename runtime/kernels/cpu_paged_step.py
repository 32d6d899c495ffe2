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


LOWEST, HIGHEST = 0x3400, 0x3F80  # of dynamic_codes.cpp.jinja


@functools.cache
def code_map(signed: bool) -> Tensor:
    """`struct Map` of dynamic_codes.cpp.jinja, as the int32 words that it consists of."""
    values = dynamic_map(signed)
    bounds = ((values[:-1] + values[1:]) / 2)[127 if signed else 0 :]  # of magnitudes
    upper = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.int32, device="cpu") << 16
    below, above = (torch.bucketize(end.view(torch.float32), bounds) for end in (upper, upper | 0xFFFF))
    assert bool((above - below <= 1).all())
    at = bounds[below.clamp(max=len(bounds) - 1)].view(torch.int32) & 0xFFFF
    entry = (below.int() << 16) + torch.where(above > below, 0xFFFF - at, torch.zeros_like(at))
    begins, lines, most = _decades(signed, bounds.tolist())
    decade, following = [], []
    for octave in range(32):
        low = 2.0 ** (octave - 31)
        decade.append(sum(begin < low for begin in begins))
        following.append(next((begin for begin in begins if low <= begin < 2 * low), torch.inf))
    planes = values.view(torch.uint8).view(256, 4).t().contiguous().view(-1)
    octaves = torch.tensor([*decade, *following], dtype=torch.float64, device="cpu")
    parts = [values, planes, entry, octaves[:32].int(), octaves[32:].float(), lines.view(-1), most]
    return torch.cat([part.view(torch.int32) for part in parts])


def _decades(signed: bool, bounds: list[float]) -> tuple[list[float], Tensor, Tensor]:
    """-> where decades begin, from the second on; slope and start, fp32 [2, 16]; most, int32 [16]. See `struct Map`.

    Seven decades of evenly spaced bounds, below them one of 0 and above them one of 1. A line is steep enough to be next to
    a whole number at both ends of its decade: a magnitude that equals a bound is looked up.
    """
    begins, lines, most, count = [bounds[0]], [(0.5 / bounds[0], 0.5)], [0], 1
    for exponent in range(7):
        steps = 2 ** (exponent + (not signed))
        low = 10.0 ** (exponent - 7)
        step = 9 * low / steps
        lines.append((1 / step, count - low / step))
        count += steps
        most.append(count - 1)
        begins.append(bounds[count - 1])
    lines += [(0.0, count + 0.5)] * (16 - len(lines))
    most += [count] * (16 - len(most))
    table = torch.tensor(lines, dtype=torch.float64, device="cpu").t() * 4096
    return begins, table.float().contiguous(), torch.tensor(most, dtype=torch.int32, device="cpu")


def make_paged_step() -> Callable[..., None]:
    """Builds the kernel and returns `paged_step`. Raises KernelError."""
    kernel = cpp_build.load("paged_step").qlora_paged_step
    kernel.argtypes = (_pointer, _int64, _pointer, *[_pointer] * 2, *[_int] * 4)
    kernel.restype = None
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
        isas = cpp_build.instruction_sets()
        number = -1 if isa == "auto" else len(isas) - 1 - isas.index(isa)
        kernel(
            *(pieces.data_ptr(), pieces.shape[0], numbers.data_ptr(), *(m.data_ptr() for m in maps)),
            *(int(lion), int(narrow), number, torch.get_num_threads()),
        )

    return paged_step
