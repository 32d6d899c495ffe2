"""What the CPU kernels' Python sides share: the numbers of dtypes and code books in C, checks of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import CODE_BOOKS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of common.cpp.jinja
QUANT_TYPES = {name: i for i, name in enumerate(CODE_BOOKS)}


def check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], numel: int, who: str = "the weight") -> None:
    if tensor.device.type != "cpu" or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        form = "contiguous" if tensor.is_contiguous() else "strided"
        raise KernelError(
            f"{name} must be a contiguous {wanted} CPU tensor, got a {form} {tensor.dtype} on {tensor.device}."
        )
    if tensor.numel() < numel:
        raise KernelError(f"{name} holds {tensor.numel()} elements, {who} needs {numel}.")


def check_scales(absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, blocks: int) -> None:
    if (absmax_scale is None) != (absmax_offset is None):
        raise KernelError("absmax_scale and absmax_offset belong together: give both or none.")
    if absmax_scale is None or absmax_offset is None:
        check("absmax", absmax, (torch.float32,), blocks)
        return
    check("absmax", absmax, (torch.uint8,), blocks)
    check("absmax_scale", absmax_scale, (torch.float32,), -(-blocks // 256))
    check("absmax_offset", absmax_offset, (torch.float32,), 1)
