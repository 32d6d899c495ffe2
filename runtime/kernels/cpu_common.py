"""What the CPU kernels' Python sides share: the numbers of dtypes and of code books in C."""

from __future__ import annotations

import torch

from ...nf4 import CODE_BOOKS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.cpp.jinja
QUANT_TYPES = {name: i for i, name in enumerate(CODE_BOOKS)}
