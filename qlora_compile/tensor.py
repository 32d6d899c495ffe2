"""`QuantizedTensor`: a 4-bit weight that stands where the dense weight stood.

A tensor subclass whose outer shape, strides, dtype and device are the dense weight's, and whose inner tensors are the
packed codes and the scales in bitsandbytes' layout. Ops that it does not know dequantize and run: eager code keeps
working, slowly and correctly. `t()` stays 4-bit, so autograd saves no dense weight for `F.linear`'s backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import (
    expert_ops,  # noqa: F401  defines torch.ops.qlora
    nf4,
    ops,  # noqa: F401
)
from .errors import ConfigError, InvalidWeightError, ModelStateError
from .lora_group import dequantize_into

HANDLERS: dict[Any, Callable[..., Any]] = {}  # of ops that keep the 4 bits; filled by tensor_ops
_INNER = ("codes", "absmax", "absmax_scale", "absmax_offset")


class Layout(NamedTuple):
    """What the inner tensors mean. `transposed`: they hold `W.t()` row-major, as bitsandbytes stores GPT-2's Conv1D.

    `per_expert`: the weight is [E, a, b] and every inner tensor has a row for each of the E matrices.
    """

    quant_type: str
    block_size: int
    transposed: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    per_expert: bool = False

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The row-major shape that the codes follow: the outer one, reversed if transposed."""
        return tuple(reversed(self.shape)) if self.transposed else self.shape


class QuantizedTensor(torch.Tensor):
    """A weight in 4 bits. Make one with `quantize_4bit`; `dequantize()` gives the dense tensor back.

    Inner tensors: `codes` uint8 [ceil(n/2)], high nibble first; `absmax` [ceil(n/block_size)], uint8 codes if
    double-quantized, else fp32; `absmax_scale` fp32 [ceil(len(absmax)/256)] and `absmax_offset` fp32 [], or None.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    layout_4bit: Layout

    @staticmethod
    def __new__(cls, data: nf4.QuantizedData, layout: Layout) -> QuantizedTensor:
        return cast(
            QuantizedTensor,
            torch.Tensor._make_wrapper_subclass(
                cls, layout.shape, strides=layout.stride, dtype=layout.dtype, device=data.codes.device
            ),
        )

    def __init__(self, data: nf4.QuantizedData, layout: Layout) -> None:
        self.codes, self.absmax, self.absmax_scale, self.absmax_offset = data
        self.layout_4bit = layout

    @property
    def quant_type(self) -> str:
        return self.layout_4bit.quant_type

    @property
    def block_size(self) -> int:
        return self.layout_4bit.block_size

    @property
    def double_quant(self) -> bool:
        return self.absmax_scale is not None

    @property
    def transposed(self) -> bool:
        return self.layout_4bit.transposed

    @property
    def per_expert(self) -> bool:
        return self.layout_4bit.per_expert

    @property
    def data_4bit(self) -> nf4.QuantizedData:
        return nf4.QuantizedData(self.codes, self.absmax, self.absmax_scale, self.absmax_offset)

    @property
    def scales(self) -> list[Tensor]:
        """[absmax], or double-quantized [absmax, absmax_scale, absmax_offset]: as the ops on experts take them."""
        return [part for part in self.data_4bit[1:] if part is not None]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales together; the shared code books are not counted."""
        return sum(part.numel() * part.element_size() for part in self.data_4bit if part is not None)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The dense weight: outer shape, strides and dtype; one rounding from fp32."""
        layout = self.layout_4bit
        rest = layout.inner_shape, layout.quant_type, layout.block_size, layout.dtype
        if layout.per_expert:
            dense = torch.ops.qlora.dequantize_experts(self.codes, self.scales, *rest)
        else:
            dense = torch.ops.qlora.dequantize_4bit(*self.data_4bit, *rest)
        if layout.transposed:
            dense = dense.t()
        if dense.stride() == layout.stride or dense.numel() <= 1:
            return dense
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=dense.device).copy_(dense)

    def _with(self, data: nf4.QuantizedData | None = None, **layout: Any) -> QuantizedTensor:
        return QuantizedTensor(data or self.data_4bit, self.layout_4bit._replace(**layout))

    def _map(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        return self._with(nf4.QuantizedData(*(None if part is None else function(part) for part in self.data_4bit)))

    # --- what autograd, Dynamo and serialization ask of a subclass ---

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        return [name for name in _INNER if getattr(self, name) is not None], self.layout_4bit

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], meta: Layout, outer_size: Any, outer_stride: Any
    ) -> QuantizedTensor:
        return cls(nf4.QuantizedData(*(inner.get(name) for name in _INNER)), meta)  # type: ignore[arg-type]

    def _stable_hash_for_caching(self) -> str:
        shapes = [None if part is None else tuple(part.shape) for part in self.data_4bit]
        return hashlib.sha256(repr((type(self).__name__, shapes, self.layout_4bit)).encode()).hexdigest()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (tuple(self.data_4bit), tuple(self.layout_4bit), bool(getattr(self, "_is_param", False)))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copy = self.clone()
            if getattr(self, "_is_param", False):
                copy._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = copy
        return memo[id(self)]

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Nothing: 4 bits do not train, so that of a model `requires_grad_(True)` means the rest."""
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise ModelStateError(
                f"A 4-bit weight of shape {tuple(self.shape)} is its codes, and .data = ... would be lost: copy_() "
                "quantizes again; to merge an adapter, save it and call qlora_compile.export."
            )
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_write("indexed assignment", self, QuantizedTensor)  # it would write into a dense copy, and be lost

    def storage(self) -> NoReturn:
        """Asked for by safetensors, whose files hold no such tensor. Raises ModelStateError."""
        raise ModelStateError(
            f"A 4-bit weight of shape {tuple(self.shape)} is no dense tensor that could be written to a file (nor a copy of "
            "it in PEFT's modules_to_save): save the adapters with save_adapter or a transformers model's save_pretrained "
            "(in accelerate in the place of accelerator.save_model, of the unwrapped model), the whole state with "
            "torch.save (in accelerate: save_state with safe_serialization=False), or a model with qlora_compile.export."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        double = ", double_quant" if self.double_quant else ""
        return (
            f"QuantizedTensor({tuple(self.shape)}, {self.dtype}, {self.quant_type}, block_size={self.block_size}"
            f"{double}, device='{self.device}')"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run_dense(QuantizedTensor, func, args, kwargs)


def run_dense(kind: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """`func` with every tensor of class `kind` dequantized; refuses to write into one."""
    if func._schema.is_mutable:
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        for argument in func._schema.arguments:
            if argument.is_write:
                _refuse_write(func, given.get(argument.name), kind)
    args, kwargs = tree_map(lambda value: value.dequantize() if isinstance(value, kind) else value, (args, kwargs))
    return func(*args, **kwargs)


def _refuse_write(func: Any, target: Any, kind: Any) -> None:
    """Raises ModelStateError if the tensor (or one of the list) that `func` would write into is a 4-bit one."""
    for value in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(value, kind):
            raise ModelStateError(
                f"{func} would write into a 4-bit weight of shape {tuple(value.shape)}: "
                "dequantize() it first, or copy_() a dense tensor into it to quantize again."
            )


def _rebuild(data: tuple[Tensor | None, ...], layout: tuple[Any, ...], is_param: bool) -> QuantizedTensor:
    tensor = QuantizedTensor(nf4.QuantizedData(*data), Layout(*layout))  # type: ignore[arg-type]
    return cast(QuantizedTensor, torch.nn.Parameter(tensor, requires_grad=False)) if is_param else tensor


torch.serialization.add_safe_globals([_rebuild])


def format_of(q: Any) -> tuple[Any, ...]:
    """What two weights must have in common for the bytes of one to mean the same in the other."""
    return q.quant_type, q.block_size, q.double_quant, q.transposed, q.per_expert


# --- public functions ---


def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    transposed: bool = False,
    per_expert: bool = False,
) -> QuantizedTensor:
    """Dense weight (fp32, bf16 or fp16, any shape) -> QuantizedTensor of the same shape and dtype.

    `transposed=True` stores the codes of `weight.t()`, as bitsandbytes does for weights of shape [in, out].
    `per_expert=True` quantizes each matrix of a weight [E, a, b] alone: the bytes that it would have by itself.
    Raises ConfigError for an unknown type or block size, InvalidWeightError for other dtypes, NaN or infinity.
    Source: Dettmers et al., arXiv 2305.14314, section 3; bytes as bitsandbytes 0.50.2 writes them on CPU.
    """
    nf4.check_format(quant_type, block_size)
    if weight.dtype not in nf4.DTYPES:
        raise InvalidWeightError(f"Only fp32, bf16 and fp16 weights can be quantized, this one is {weight.dtype}.")
    if transposed and weight.dim() != 2:
        raise InvalidWeightError(f"Only a 2-D weight can be stored transposed, this one is {tuple(weight.shape)}.")
    if per_expert and (weight.dim() != 3 or transposed):
        raise InvalidWeightError(f"Only a 3-D weight has a matrix per expert, this one is {tuple(weight.shape)}.")
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.detach()
        if per_expert:  # one after the other: `weight` may be a file, whose matrices are read when they are asked for
            one = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
            matrices = [quantize_4bit(weight[expert], **one) for expert in range(weight.shape[0])]  # type: ignore[arg-type]
            return stack_experts(matrices)._with(stride=weight.stride())
        _check_finite(weight)
        parts = torch.ops.qlora.quantize_4bit(
            weight.t() if transposed else weight, quant_type, block_size, double_quant
        )
        data = nf4.QuantizedData(*parts, *[None] * (4 - len(parts)))
        layout = Layout(quant_type, block_size, transposed, tuple(weight.shape), weight.stride(), weight.dtype)
        return QuantizedTensor(data, layout)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: least and greatest carry both, in one pass and no memory.

    (`isfinite().all()` takes 50 times as long on bf16.)
    """
    if not tensor.numel() or tensor.device.type == "meta":
        return True
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def stack_experts(matrices: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """E weights [a, b] of one format -> one [E, a, b], of the same bytes."""
    layout = matrices[0].layout_4bit
    parts = zip(*(matrix.data_4bit for matrix in matrices), strict=True)
    data = nf4.QuantizedData(*(None if part[0] is None else torch.stack(part) for part in parts))
    stride = (layout.shape[0] * layout.shape[1], *layout.stride)
    return QuantizedTensor(data, layout._replace(shape=(len(matrices), *layout.shape), stride=stride, per_expert=True))


def _check_finite(weight: Tensor) -> None:
    """Raises InvalidWeightError for NaN or infinity."""
    if not is_finite(weight):
        raise InvalidWeightError(
            "The weight holds NaN or infinity and cannot be quantized: repair the checkpoint first."
        )


def quantize_like(weight: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """Dense -> 4 bits with the type, block size and storage order that `like` has."""
    return quantize_4bit(
        weight.to(like.dtype),
        quant_type=like.quant_type,
        block_size=like.block_size,
        double_quant=like.double_quant,
        transposed=like.transposed,
        per_expert=like.per_expert,
    )


def dequantize_4bit(q: QuantizedTensor, *, out: Tensor | None = None) -> Tensor:
    """QuantizedTensor -> dense tensor of its shape and dtype; with `out`, written there (in the dtype of `out`).

    Raises ConfigError for an `out` of another shape. Nothing checks that `q` is a QuantizedTensor: without `out`, a dense
    tensor comes back in fp32 (torch's own `Tensor.dequantize`); anything else is an AttributeError.
    """
    if out is None:
        return q.dequantize()
    if tuple(out.shape) != tuple(q.shape):
        raise ConfigError(f"out must have the weight's shape {tuple(q.shape)}, got {tuple(out.shape)}.")
    if q.transposed or q.per_expert or not out.is_contiguous():
        return out.copy_(q.dequantize())
    return dequantize_into(out, *q.data_4bit, q.quant_type, q.block_size)


from . import tensor_ops  # noqa: E402, F401, I001  the ops that keep the 4 bits
from . import sharding  # noqa: E402, F401  and those by which FSDP2 splits a weight
