"""What the CPU kernels' Python sides share: the numbers of dtypes, code books and instruction sets in C."""

from __future__ import annotations

import torch

from ...errors import KernelError
from ...nf4 import CODE_BOOKS
from . import cpp_build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.cpp.jinja
QUANT_TYPES = {name: i for i, name in enumerate(CODE_BOOKS)}


def isa_number(isa: str) -> int:
    """In enum Isa. Raises KernelError for one that this architecture has not."""
    if isa == "auto":
        return -1
    isas = cpp_build.instruction_sets()
    if isa not in isas:
        raise KernelError(f"There is no instruction set {isa!r} here: known are auto, {', '.join(isas)}.")
    return len(isas) - 1 - isas.index(isa)
