"""Ops on 4-bit weights and their shards that keep the 4 bits: split and slice rows, fill a buffer, show all of it.

A part of the rows is a view where a block of scales begins with it; elsewhere these ops get dense rows, as all others.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from . import nf4
from . import sharding as shards
from . import tensor as weights
from .errors import ModelStateError
from .sharding import QuantizedShard
from .tensor import Layout, QuantizedTensor, format_of

aten = torch.ops.aten


def _rows(weight: Any, start: int, stop: int) -> QuantizedShard | None:
    """Rows [start, stop) as a view, or None where a block does not begin with them."""
    layout = _layout(weight)
    if layout.per_expert:
        parts = [None if part is None else part[start:stop] for part in weight.data_4bit]
        first = torch.zeros((), dtype=torch.long)
        return QuantizedShard(nf4.QuantizedData(*parts), first, layout, (stop - start, *weight.shape[1:]))  # type: ignore[arg-type]
    if weight.dim() != 2 or layout.transposed or not weight.is_contiguous():
        return None
    columns, block = weight.shape[1], layout.block_size
    whole_end = stop == weight.shape[0]
    if start * columns % block or (stop * columns % block and not whole_end):
        return None
    codes = weight.codes[start * columns // 2 : (stop * columns + 1) // 2]
    absmax = weight.absmax[start * columns // block : -(-stop * columns // block)]
    first = weight.first_block if isinstance(weight, QuantizedShard) else torch.zeros((), dtype=torch.long)
    if start:
        first = first + start * columns // block
    data = nf4.QuantizedData(codes, absmax, weight.absmax_scale, weight.absmax_offset)
    return QuantizedShard(data, first, layout, (stop - start, columns))


def _layout(weight: Any) -> Layout:
    return weight.whole if isinstance(weight, QuantizedShard) else weight.layout_4bit


def _slice(weight: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if dim % weight.dim() or step != 1:
        return NotImplemented
    begin, stop, _ = slice(start, end).indices(weight.shape[0])
    rows = _rows(weight, begin, max(begin, stop))
    return NotImplemented if rows is None else rows


def _split(weight: Any, size: int, dim: int = 0) -> Any:
    """`torch.chunk` and `torch.split` of rows: views in 4 bits where blocks end with them, dense otherwise."""
    if dim % weight.dim():
        return NotImplemented
    total = weight.shape[0]
    parts = [_rows(weight, start, min(start + size, total)) for start in range(0, total, size)]
    if any(part is None for part in parts):
        if _called_by_fully_shard():
            raise ModelStateError(f"{_problem(weight, size)}, {_WAY_OUT}")
        return NotImplemented
    return parts


_WAY_OUT = "use another number of ranks, or keep it whole on every rank with fully_shard(..., ignored_params={weight})."


def split_problem(weight: Tensor, ranks: int) -> str | None:
    """Why FSDP2 cannot split the rows of this weight over so many ranks, in words; None where it can."""
    size = -(-weight.shape[0] // ranks)
    if not isinstance(weight, QuantizedTensor) or _rows(weight, 0, size) is not None:
        return None
    return _problem(weight, size)


def _problem(weight: Any, rows: int) -> str:
    layout, what = _layout(weight), f"A 4-bit weight of shape {tuple(weight.shape)}"
    if weight.dim() != 2 or layout.transposed or not weight.is_contiguous():
        return f"{what} that is not stored row by row (GPT-2's Conv1D) cannot be split by rows"
    return (
        f"{what} cannot be split into {rows} rows a rank: {rows} x {weight.shape[1]} values do not end on a block of "
        f"{layout.block_size}; prepare with a smaller block_size"
    )


def _called_by_fully_shard() -> bool:
    """Whether FSDP2 is making the sharded parameter: elsewhere `new_zeros` and odd splits of a weight stay dense."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            break
        if frame.f_code.co_name == "_init_sharded_param":
            return True
        frame = frame.f_back
    return False


def _new_zeros(weight: Any, size: Any, **options: Any) -> Any:
    """The buffer that FSDP2 fills with a rank's rows: codes and scales of zero, the weight's second-level scales."""
    if isinstance(weight, QuantizedTensor) and not _called_by_fully_shard():
        return NotImplemented
    layout = _layout(weight)
    if layout.per_expert and tuple(size[1:]) == tuple(weight.shape[1:]):
        parts = [None if part is None else part.new_zeros((size[0], *part.shape[1:])) for part in weight.data_4bit]
        return QuantizedShard(nf4.QuantizedData(*parts), torch.zeros((), dtype=torch.long), layout, tuple(size))  # type: ignore[arg-type]
    if len(size) != 2 or layout.transposed or options.get("dtype", layout.dtype) != layout.dtype:
        return NotImplemented
    values = size[0] * size[1]
    # a shard of all rows may end inside a block
    codes, blocks = -(-values // 2), -(-values // layout.block_size)
    data = nf4.QuantizedData(
        weight.codes.new_zeros(codes),
        weight.absmax.new_zeros(blocks),
        *(None if part is None else part.clone() for part in (weight.absmax_scale, weight.absmax_offset)),
    )
    return QuantizedShard(data, torch.zeros((), dtype=torch.long), layout, tuple(size))


def _copy_(dest: Any, source: Any, non_blocking: bool = False) -> Any:
    """Rows into rows, byte for byte. Dense rows have no second-level scales of their own, so they are refused."""
    if not isinstance(dest, QuantizedShard):
        return dest.copy_(source.dequantize(), non_blocking)
    if not isinstance(source, (QuantizedShard, QuantizedTensor)) or tuple(source.shape) != tuple(dest.shape):
        raise ModelStateError(
            f"{dest!r} takes rows in 4 bits of its shape, not {type(source).__name__} {source.shape}."
        )
    if format_of(source) != format_of(dest):
        raise ModelStateError(f"{source!r} is stored in another format than {dest!r}: prepare both with one config.")
    for own, other in zip(dest.data_4bit, source.data_4bit, strict=True):
        if own is not None:
            own.copy_(cast(Tensor, other), non_blocking)
    dest.first_block.copy_(source.first_block if isinstance(source, QuantizedShard) else torch.zeros(()))
    return dest


def _view(shard: Any, size: Any) -> Any:
    shape = torch.empty(tuple(shard.shape), device="meta").view(size).shape
    return shard._with(tuple(shape))


def _as_strided(weight: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    same = tuple(size) == tuple(weight.shape) and tuple(stride) == weight.stride() and not storage_offset
    return weight._with() if same else NotImplemented


def _to_copy(shard: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
    if dtype not in (None, shard.dtype):
        return NotImplemented
    return shard._map(lambda part: part.to(device=device, copy=True) if device is not None else part.clone())


def _into_weight(dest: Any, source: Any, non_blocking: bool = False) -> Any:
    """A whole weight that is stored as one shard (one rank) goes into a QuantizedTensor byte for byte."""
    if not isinstance(source, QuantizedShard) or not isinstance(dest, QuantizedTensor):
        return _quantizing_copy(dest, source, non_blocking)
    rows = _rows(dest, 0, dest.shape[0])
    if rows is None:
        return _quantizing_copy(dest, source.dequantize(), non_blocking)
    _copy_(rows, source, non_blocking)
    return dest


_quantizing_copy = weights.HANDLERS[aten.copy_.default]
weights.HANDLERS |= {
    aten.split.Tensor: _split,
    aten.slice.Tensor: _slice,
    aten.new_zeros.default: _new_zeros,
    aten.as_strided.default: _as_strided,
    aten.copy_.default: _into_weight,
}
shards.HANDLERS |= {
    aten.split.Tensor: _split,
    aten.slice.Tensor: _slice,
    aten.new_zeros.default: _new_zeros,
    aten.as_strided.default: _as_strided,
    aten.copy_.default: _copy_,
    aten.view.default: _view,
    aten.detach.default: lambda shard: shard._with(),
    aten.alias.default: lambda shard: shard._with(),
    aten.lift_fresh.default: lambda shard: shard._with(),
    aten.clone.default: lambda shard, memory_format=None: shard._map(torch.clone),
    aten.pin_memory.default: lambda shard, device=None: shard._map(lambda part: part.pin_memory()),
    aten.is_pinned.default: lambda shard, device=None: shard.codes.is_pinned(),
    aten._to_copy.default: _to_copy,
}
