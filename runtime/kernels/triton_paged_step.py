"""The Triton sweep over pages of optimizer state as a Python function: one launch for all pieces of one type."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...nf4 import dynamic_map
from . import triton_build
from .cpu_common import DTYPES
from .triton_common import FUSED, cdiv
from .triton_launch import TENSOR, Launch, prepared
from .triton_low_rank import TYPES

_BLOCKS = 4  # of 256 elements: a program of 128 threads has 8 each
_TYPES = {number: TYPES[dtype] for dtype, number in DTYPES.items()}


@functools.cache
def _maps(device: torch.device) -> tuple[Tensor, ...]:
    """Values and the bounds between them, of the map with a sign and of the one without."""
    found = []
    for signed in (True, False):
        values = dynamic_map(signed)
        found += [values.to(device), ((values[:-1] + values[1:]) / 2).to(device)]
    return tuple(found)


def paged_step(
    pieces: Tensor, numbers: Tensor, lion: bool, narrow: bool, dtype: int, most: int, places: Tensor
) -> None:
    """Update the parameters and states that `pieces` (int64 [P, 6]) points at, with rows of `numbers` (fp32 [G, 8]); both
    are on the device. Parameters and gradients are all of one type, number `dtype` of cpu_common.DTYPES, and have `most`
    elements a piece at most. A piece's last column is the address of its gradient's fp32 sum, or 0: where that is not
    finite nothing is changed, and nobody has to wait to know it. Where the state's address is 0 it is read from `places`
    (int64 [P, 2], the first column), pinned memory of the host's."""
    programs = cdiv(most, 256 * _BLOCKS)
    tensors = [pieces, places, numbers, *(_maps(numbers.device) if narrow else ())]
    what = "paged_step", lion, narrow, dtype, programs
    prepared(what, tensors, lambda: _launch(pieces.shape[0], programs, lion, narrow, dtype))(tensors)


def _launch(pieces: int, programs: int, lion: bool, narrow: bool, dtype: int) -> Launch:
    kernel = triton_build.load("paged_step", uses_codes=False, lion=lion, narrow=narrow).paged_step
    arguments = [TENSOR] * (7 if narrow else 3)
    return Launch(kernel, (pieces, programs), arguments, TYPE=_TYPES[dtype], BLOCKS=_BLOCKS, num_warps=4, **FUSED)
