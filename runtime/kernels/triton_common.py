"""What the Triton kernels' Python sides share: tables on the device, launch guards."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import dynamic_map

_NOTHING = contextlib.nullcontext()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # a product and the sum it goes into may be rounded once


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, which kernels call too, takes microseconds from Python, some twenty times an op."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def device_map(device: torch.device) -> Tensor:
    """The dynamic map of the scales' codes on a device, fp32 [256]; made once, before any graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError("Run the model once before capturing a CUDA graph: its tables are not on the device yet.")
    with torch.inference_mode(False):
        return dynamic_map().to(device)


def scale_arguments(absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None) -> list[Tensor]:
    """The scales' tensors as kernels take them: absmax, or absmax, absmax_scale, absmax_offset and the dynamic map."""
    if absmax_scale is None or absmax_offset is None:
        return [absmax]
    return [absmax, absmax_scale, absmax_offset, device_map(absmax.device)]


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's. (The interpreter runs on CPU tensors.)"""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; 4 under the interpreter, so that small tests split their sums too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
