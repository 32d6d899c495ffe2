"""Ops on a `QuantizedTensor` that keep the 4 bits, by the op that `__torch_dispatch__` sees; all others get it dense."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import nf4
from .errors import ModelStateError
from .tensor import HANDLERS, QuantizedTensor, format_of, quantize_like

aten = torch.ops.aten


def _transpose(q: QuantizedTensor, dim0: int = 0, dim1: int = 1) -> Any:
    if q.dim() != 2:
        return NotImplemented
    if dim0 % 2 == dim1 % 2:
        return q._with()
    layout = q.layout_4bit
    return q._with(shape=layout.shape[::-1], stride=layout.stride[::-1], transposed=not layout.transposed)


def _permute(q: QuantizedTensor, dims: list[int]) -> Any:
    return _transpose(q, 0, 1 if [d % 2 for d in dims] == [1, 0] else 0) if q.dim() == 2 else NotImplemented


def _select(q: QuantizedTensor, dim: int, index: int) -> Any:
    """One expert's matrix, still in 4 bits: what a loop over the experts reads."""
    if not q.per_expert or dim % q.dim():
        return NotImplemented
    layout = q.layout_4bit
    one = layout._replace(shape=layout.shape[1:], stride=layout.stride[1:], per_expert=False)
    return QuantizedTensor(nf4.QuantizedData(*(None if part is None else part[index] for part in q.data_4bit)), one)


def _to_copy(q: QuantizedTensor, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    moved = q._map(lambda part: part.to(device=device, copy=True) if device is not None else part.clone())
    return moved._with(dtype=dtype) if dtype is not None else moved


def _copy_(dest: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(dest, QuantizedTensor):
        return dest.copy_(source.dequantize(), non_blocking)
    if tuple(dest.shape) != tuple(source.shape):
        raise ModelStateError(f"A weight of shape {tuple(source.shape)} cannot be copied into {dest!r}.")
    if not isinstance(source, QuantizedTensor):
        if torch.equal(source, dest.dequantize()):
            return dest  # quantizing its own dense form once more would change a scale here and there
        source = quantize_like(source, dest)
    if format_of(source) != format_of(dest):
        source = quantize_like(source.dequantize(), dest)
    for mine, theirs in zip(dest.data_4bit, source.data_4bit, strict=True):
        if mine is not None:
            mine.copy_(cast(Tensor, theirs), non_blocking)
    return dest


def _linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Any:
    """x [..., K] Wᵀ + bias for a W [N, K] stored row-major: the op of compiled code, without adapters."""
    q = weight
    usable = q.dim() == 2 and not q.transposed and x.dtype == q.dtype and not isinstance(x, QuantizedTensor)
    usable = usable and x.dim() > 0 and x.shape[-1] == q.shape[1]  # else the dense op says what does not fit
    if not usable or (bias is not None and bias.dim() != 1):
        return NotImplemented
    double = q.double_quant
    scales = [q.absmax_scale] if double else [], [q.absmax_offset] if double else []
    biases: list[Tensor] = [] if bias is None else [bias]
    rest: Any = (biases, [], [], [], [], [0], [], 0.0, [q.shape[0]], q.quant_type, q.block_size, x.dtype)
    return torch.ops.qlora.lora_linear(x, [q.codes], [q.absmax], *scales, *rest)[0]


def _mm(x: Tensor, weight: Any) -> Any:
    return _linear(x, _transpose(weight)) if isinstance(weight, QuantizedTensor) else NotImplemented


def _addmm(bias: Tensor, x: Tensor, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    plain = isinstance(weight, QuantizedTensor) and alpha == beta == 1
    return _linear(x, _transpose(weight), bias) if plain else NotImplemented


HANDLERS |= {
    aten.detach.default: lambda q: q._with(),
    aten.alias.default: lambda q: q._with(),
    aten.lift_fresh.default: lambda q: q._with(),
    aten.clone.default: lambda q, memory_format=None: q._map(torch.clone),
    aten.contiguous.default: lambda q, memory_format=None: q._with() if q.is_contiguous() else NotImplemented,
    aten.pin_memory.default: lambda q, device=None: q._map(lambda part: part.pin_memory()),
    aten.is_pinned.default: lambda q, device=None: q.codes.is_pinned(),
    aten.select.int: _select,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.numpy_T.default: _transpose,
    aten.mT.default: _transpose,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.linear.default: lambda x, w, b=None: _linear(x, w, b) if isinstance(w, QuantizedTensor) else NotImplemented,
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    torch.ops.qlora.densify.default: lambda q: q.dequantize(),
}
