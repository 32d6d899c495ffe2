"""dense weight <-> 4-bit codes + block scales, in plain torch: nf4 and fp4, bit for bit as bitsandbytes has them.

A weight is flattened row-major and cut into blocks of `block_size` values; each value is stored as the index (4 bits)
of the nearest code book entry times the block's largest magnitude (`absmax`). Double quantization stores those scales
as 8-bit indices into a dynamic map, in blocks of 256, after their mean is subtracted (QLoRA, arXiv 2305.14314, §3).

Where the two directions of bitsandbytes 0.50.2 (`backends/default/ops.py`, `csrc/cpu_ops.cpp`) take liberties, so does
this file, and the comment beside the line says so. Every kernel of ours is tested against these functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, InvalidWeightError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are quantized, and of what kernels read
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCK_SIZE = 256  # block size of the second quantization, that of the scales
_CHUNK = 1 << 22  # elements handled at a time: bounds temporary memory; a multiple of every block size, and even


def _fp32(values: Sequence[float]) -> Tensor:
    """A CPU tensor whatever the default device and dtype are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the three low bits; sign bit 3; divided by 12
CODE_BOOKS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    # The division is fp32's, as bitsandbytes' is: 1/3 here is not Python's 1/3. Both zeros are positive (0.0 + -0.0).
    "fp4": tuple((_fp32([0.0 + s * m for s in (1, -1) for m in _FP4_MAGNITUDES]) / 12.0).tolist()),
}


class QuantizedData(NamedTuple):
    """The stored form of a weight of n values, in bitsandbytes' layout: nb = ceil(n / block_size) blocks.

    `codes` uint8 [ceil(n / 2)], high nibble first. `absmax` fp32 [nb], or, double-quantized, uint8 [nb] with
    `absmax_scale` fp32 [ceil(nb / 256)] and `absmax_offset` fp32 [] (both None otherwise).
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None


def check_format(quant_type: str, block_size: int) -> None:
    """Raises ConfigError unless the code book and the block size exist."""
    if quant_type not in CODE_BOOKS:
        raise ConfigError(f"quant_type must be one of {', '.join(CODE_BOOKS)}, got {quant_type!r}.")
    if block_size not in BLOCK_SIZES:
        raise ConfigError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}.")


@functools.cache
def code_book(quant_type: str) -> Tensor:
    """The 16 values by code index, fp32 [16], on the CPU. Shared: do not write to it."""
    return _fp32(CODE_BOOKS[quant_type])


@functools.cache
def code_bounds(quant_type: str) -> tuple[Tensor, Tensor]:
    """(midpoints between neighbouring values, fp32 [15]; code index of each value in ascending order, int64 [16])."""
    book = code_book(quant_type)
    order = torch.argsort(book)  # fp4 holds 0.0 twice, and bitsandbytes' choice is whatever this same call returns
    return (book[order[:-1]] + book[order[1:]]) / 2, order


@functools.cache
def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 ascending values of the 8-bit dynamic data type (arXiv 1511.04561), fp32 [256], on the CPU. Shared.

    Seven decades, 10^-6 to 1; each larger one has twice as many fraction bits. Equal to bitsandbytes'
    `create_dynamic_map(signed)`.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        boundaries = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        means = (boundaries[:-1] + boundaries[1:]) / 2.0 * 10 ** (exponent - 6)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return _fp32(sorted(values + [0.0] * (256 - len(values))))


@functools.cache
def _dynamic_map_lookup() -> Tensor:
    """Nearest signed dynamic code of each of 65,536 evenly spaced values in [-1, 1], uint8 [65536]."""
    values = dynamic_map()
    grid = torch.arange(65536, dtype=torch.float64, device="cpu") / 65535 * 2 - 1
    return torch.bucketize(grid.float(), (values[:-1] + values[1:]) / 2).to(torch.uint8)


# Filled now: first called later, they might keep a fake tensor or an inference tensor of whoever called.
with torch.inference_mode(False):
    for _name in CODE_BOOKS:
        code_book(_name), code_bounds(_name)
    dynamic_map(), _dynamic_map_lookup()


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [nb] -> (dynamic 8-bit codes uint8 [nb], fp32 scale of each 256 of them [ceil(nb / 256)]).

    bitsandbytes' CPU library does not search the map: it rounds to one of 65,536 grid points first, so it can miss
    the nearest code by several steps near zero, and calls an exact 0 code 131. A block of zeros gets code 0.
    """
    count = scales.numel()
    blocks = -(-count // SCALE_BLOCK_SIZE)
    padded = torch.zeros(blocks * SCALE_BLOCK_SIZE, dtype=torch.float32, device=scales.device)
    padded[:count] = scales
    padded = padded.view(blocks, SCALE_BLOCK_SIZE)
    block_scale = padded.abs().amax(dim=1)
    normalized = (padded * block_scale.reciprocal()[:, None]).clamp(-1, 1)
    # The library computes this with one fused multiply-add; in fp64 the product and the sum are exact, one rounding.
    position = (((normalized + 1.0) * 0.5).double() * 65535 + 0.5).float()
    position = position.nan_to_num(nan=0.0).to(torch.int32)  # 0 * inf where the block's scale is below 2^-128
    codes = _dynamic_map_lookup().to(scales.device)[position]
    codes[block_scale == 0] = 0
    return codes.view(-1)[:count].clone(), block_scale


def dequantize_scales(
    absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None, first: int = 0
) -> Tensor:
    """Scales as they are stored -> fp32 [nb]: `map[code] * scale + offset`, rounded after each step.

    `first` is the number of the first of these blocks in the weight, whose `absmax_scale` begins with block 0.
    """
    if absmax_scale is None or absmax_offset is None:
        return absmax
    start, skip = divmod(first, SCALE_BLOCK_SIZE)
    values = dynamic_map().to(absmax.device)[absmax.to(torch.int32)]
    values *= absmax_scale[start:].repeat_interleave(SCALE_BLOCK_SIZE)[skip : skip + absmax.numel()]
    return values.add_(absmax_offset)


def _quantize_chunk(values: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Up to _CHUNK weights [n] -> (packed codes uint8 [ceil(n / 2)], absmax fp32 [ceil(n / block_size)])."""
    values = values.float()
    full = values.numel() // block_size * block_size
    blocks = values[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # Whole blocks are multiplied by the reciprocal and keep their true absmax, even 0; a ragged one is divided, and
    # its stored absmax is never below 1e-38. Both are bitsandbytes'.
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
    if full < values.numel():
        last = values[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, (values[full:] / last).clamp_(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    bounds, order = code_bounds(quant_type)
    codes = torch.bucketize(scaled, bounds.to(values.device), out_int32=True)
    if quant_type != "nf4":
        codes = order.to(values.device)[codes]
    codes = codes.to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax


def quantize_reference(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> QuantizedData:
    """Dense weight (fp32, bf16 or fp16, any shape and strides) -> QuantizedData on the weight's device.

    The bytes are those of bitsandbytes' `quantize_4bit(weight, compress_statistics=double_quant)` on the CPU at equal
    thread count (`absmax_offset` is a mean, whose summation order depends on it). An all-zero block takes the code of
    0.0. Values must be finite: the caller checks. An empty weight gives empty tensors and an offset of 0.

    Raises ConfigError (no such quant_type or block_size), InvalidWeightError (another dtype).
    """
    check_format(quant_type, block_size)
    if weight.dtype not in DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        raise InvalidWeightError(f"Only float32, bfloat16 and float16 weights can be quantized, got {name}.")
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=flat.device)
    for start in range(0, count, _CHUNK):
        packed, scales = _quantize_chunk(flat[start : start + _CHUNK], quant_type, block_size)
        codes[start // 2 : start // 2 + packed.numel()] = packed
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    return pack_scales(codes, absmax, double_quant)


def pack_scales(codes: Tensor, absmax: Tensor, double_quant: bool) -> QuantizedData:
    """(codes, fp32 absmax [nb]) -> QuantizedData, the scales quantized to 8 bits if `double_quant`."""
    if not double_quant:
        return QuantizedData(codes, absmax, None, None)
    # bitsandbytes' offset for an empty tensor is NaN, and poisons a file that stores it.
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    scale_codes, scale = quantize_scales(absmax - offset)
    return QuantizedData(codes, scale_codes, scale, offset)


def dequantize_reference(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """QuantizedData's tensors -> dense weight of `shape` in `dtype`: book[code] * absmax in fp32, rounded once.

    Equal to bitsandbytes' `dequantize_4bit` on the CPU, except where that depends on the machine: its AVX-512 kernel
    takes another block's scale if rows end inside a block (a last dimension that is a multiple of 16 but not of the
    block size, bug seen in 0.50.2), flushes denormal bf16 results to zero, and fp4's second zero is -0.0 or 0.0.

    Raises ConfigError (no such quant_type or block_size).
    """
    check_format(quant_type, block_size)
    count = math.prod(shape)
    book = code_book(quant_type).to(codes.device)
    out = torch.empty(count, dtype=dtype, device=codes.device)
    scales = dequantize_scales(absmax, absmax_scale, absmax_offset)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        packed = codes[start // 2 : (stop + 1) // 2]
        index = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: stop - start]
        values = book[index.to(torch.int32)]
        full = values.numel() // block_size * block_size
        first = start // block_size
        values[:full].view(-1, block_size).mul_(scales[first : first + full // block_size, None])
        values[full:].mul_(scales[first + full // block_size :][:1])
        out[start:stop] = values
    return out.view(tuple(shape))
