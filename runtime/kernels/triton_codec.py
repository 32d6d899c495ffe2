"""The Triton codec as Python functions on tensors: dequantize and quantize, one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from ...nf4 import QuantizedData, check_format, pack_scales
from . import triton_build
from .checks import check, check_scales
from .triton_common import DTYPES, on_device, scale_arguments
from .triton_launch import TENSOR, Launch, prepared

TILE_VALUES = 4096  # a program: 128 threads with 16 bytes of codes each
_EXACT = {"num_warps": 4, "enable_fp_fusion": False}  # every product is rounded on its own, as in the torch reference


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    numel: int,
    quant_type: str,
    block_size: int,
    out: Tensor,
) -> None:
    """Writes `numel` weights into `out`: bit for bit `nf4.dequantize_reference`.

    `out` is contiguous, of any shape; or [N, K], its rows apart, with whole blocks in a row.
    """
    tensors = [codes, *scale_arguments(absmax, absmax_scale, absmax_offset), out]
    halves = absmax_scale is None, absmax_offset is None
    launch = prepared(
        ("dequantize_4bit", numel, quant_type, block_size, *halves),
        tensors,
        lambda: _dequantize_launch(
            QuantizedData(codes, absmax, absmax_scale, absmax_offset), numel, quant_type, block_size, out
        ),
    )
    if numel:
        launch(tensors)


def _dequantize_launch(data: QuantizedData, numel: int, quant_type: str, block_size: int, out: Tensor) -> Launch:
    check_format(quant_type, block_size)
    check("codes", data.codes, (torch.uint8,), (numel + 1) // 2, out.device)
    check_scales(*data[1:], -(-numel // block_size), out.device)
    rows: list[int] = []
    if not out.is_contiguous() and out.dim() == 2 and out.stride(1) == 1 and out.shape[1] % block_size == 0:
        rows = [out.shape[1], out.stride(0)]
        check("a row of out", out[:1], DTYPES, numel // max(out.shape[0], 1), out.device)
    else:
        check("out", out, DTYPES, numel, out.device)
    double = data.absmax_scale is not None
    blocks = max(TILE_VALUES // block_size, 1)
    spec = {"quant_type": quant_type, "double_quant": double} | ({"rows": True} if rows else {})
    kernel = triton_build.load("dequantize_4bit", **spec).dequantize_4bit
    arguments = [TENSOR] * (6 if double else 3) + [numel, (numel + 1) // 2, *rows]
    grid = (-(-numel // (blocks * block_size)),)
    return Launch(kernel, grid, arguments, BLOCK_SIZE=block_size, BLOCKS=blocks, **_EXACT)


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> QuantizedData:
    """Contiguous weight (fp32, bf16, fp16) -> QuantizedData: the codes and scales of `nf4.quantize_reference`.

    Double-quantized scales are packed by the reference, on the device; their mean may differ from the CPU's in its last
    bit, since it depends on the order of a sum.
    """
    check_format(quant_type, block_size)
    check("weight", weight, DTYPES, 0, weight.device)
    numel = weight.numel()
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=weight.device)
    if numel:
        blocks = max(TILE_VALUES // block_size, 1)
        grid = (-(-numel // (blocks * block_size)),)
        if grid[0] >= 2**31:
            raise KernelError(f"A weight of {numel} values is too large for one launch of quantize_4bit.")
        module = triton_build.load("quantize_4bit", quant_type=quant_type)
        with on_device(weight):
            module.quantize_4bit[grid](
                weight, codes, absmax, numel, (numel + 1) // 2, BLOCK_SIZE=block_size, BLOCKS=blocks, **_EXACT
            )
    return pack_scales(codes, absmax, double_quant)
