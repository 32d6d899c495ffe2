"""What kernels ask of the tensors that they get, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import SCALE_BLOCK_SIZE

_CPU = torch.device("cpu")


def check(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    numel: int,
    device: torch.device = _CPU,
    who: str = "the weight",
) -> None:
    """Raises KernelError unless `tensor` is contiguous, of one of these dtypes, on this device, and as large as needed."""
    if tensor.device != device or tensor.dtype not in dtypes or not tensor.is_contiguous():
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        form = "contiguous" if tensor.is_contiguous() else "strided"
        raise KernelError(
            f"{name} must be a contiguous {wanted} tensor on {device}, got a {form} {tensor.dtype} on {tensor.device}."
        )
    if tensor.numel() < numel:
        raise KernelError(f"{name} holds {tensor.numel()} elements, {who} needs {numel}.")


def check_scales(
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    blocks: int,
    device: torch.device = _CPU,
) -> None:
    """The same for the scales of a weight of so many blocks, double-quantized or not."""
    if (absmax_scale is None) != (absmax_offset is None):
        raise KernelError("absmax_scale and absmax_offset belong together: give both or none.")
    if absmax_scale is None or absmax_offset is None:
        check("absmax", absmax, (torch.float32,), blocks, device)
        return
    check("absmax", absmax, (torch.uint8,), blocks, device)
    check("absmax_scale", absmax_scale, (torch.float32,), -(-blocks // SCALE_BLOCK_SIZE), device)
    check("absmax_offset", absmax_offset, (torch.float32,), 1, device)
