"""The Triton sweep over pages of optimizer state as a Python function: one launch for all pieces of one type."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...nf4 import dynamic_map
from . import triton_build
from .cpu_common import DTYPES
from .triton_common import FUSED, on_device, sent_to
from .triton_low_rank import TYPES

_BLOCKS = 4  # of 256 elements: a program of 128 threads has 8 each


@functools.cache
def _maps(device: torch.device) -> tuple[Tensor, ...]:
    """Values and the bounds between them, of the map with a sign and of the one without."""
    found = []
    for signed in (True, False):
        values = dynamic_map(signed)
        found += [values.to(device), ((values[:-1] + values[1:]) / 2).to(device)]
    return tuple(found)


def paged_step(pieces: Tensor, numbers: Tensor, lion: bool, narrow: bool, totals: Tensor | None = None) -> None:
    """Update the parameters and states that `pieces` (int64 [P, 6], on the CPU) points at, with rows of `numbers` (fp32
    [G, 8], on the device). Gradients have their parameter's type. `totals` (int64 [P], on the CPU): addresses of their
    fp32 sums, or 0; where one is not finite nothing is changed, and nobody has to wait to know it."""
    device = numbers.device
    module = triton_build.load("paged_step", uses_codes=False, lion=lion, narrow=narrow)
    maps = _maps(device) if narrow else ()
    for dtype, number in DTYPES.items():
        own = pieces[:, 5] == number
        chosen = pieces[own]
        if len(chosen):
            chosen[:, 5] = 0 if totals is None else totals[own]
            grid = (len(chosen), -(-int(chosen[:, 3].max()) // (256 * _BLOCKS)))
            with on_device(numbers):
                module.paged_step[grid](
                    sent_to(device, chosen), numbers, *maps, TYPE=TYPES[dtype], BLOCKS=_BLOCKS, num_warps=4, **FUSED
                )
