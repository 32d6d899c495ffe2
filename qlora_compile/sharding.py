"""QuantizedTensor -> `QuantizedShard`, the rows of one rank, and back: what FSDP2 (`fully_shard`) asks of a 4-bit weight.

FSDP2 splits a parameter's rows over the ranks, keeps each rank's part as a DTensor, and gathers it before use:

    QuantizedTensor --split--> QuantizedShard --fsdp_pre_all_gather--> bytes --all-gather--> QuantizedTensor

Codes and block scales travel as uint8, never as a view in a floating-point type (hardware and libraries may change the
payload of a NaN: bitsandbytes#1945 lost 0.1% of its weights so), and a quarter of the bytes of a bf16 weight. The
second-level scales (4 bytes for 16,384 weights) are the same on every rank and do not travel.

Rows are split where a block of scales ends. N rows of K values in blocks of B, on R ranks: ceil(N / R) * K must be a
multiple of B; the last shards may be shorter, or empty. The fused experts of a layer, [E, out, in], are split by expert:
each is stored by itself, second-level scales too, and all of it travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .tensor import Layout, QuantizedTensor, run_dense

Part = Callable[[Tensor], Tensor]
HANDLERS: dict[Any, Callable[..., Any]] = {}  # of ops on shards; filled by sharding_ops


class QuantizedShard(torch.Tensor):
    """Rows of a 4-bit weight, as they are stored in it. `dequantize()` gives these rows; unknown ops get them dense.

    `codes` and `absmax` are those of the rows (views of the weight's, or of a padded buffer); `absmax_scale` and
    `absmax_offset` those of the whole weight, or of these experts. `first_block` is the number of the first block in the
    weight, int64 [] on the CPU: a tensor, so that a shard that is filled through a view of it knows. `whole` describes
    the weight.
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    first_block: Tensor
    whole: Layout

    @staticmethod
    def __new__(cls, data: nf4.QuantizedData, first_block: Tensor, whole: Layout, shape: tuple[int, ...]) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=whole.dtype, device=data.codes.device)

    def __init__(self, data: nf4.QuantizedData, first_block: Tensor, whole: Layout, shape: tuple[int, ...]) -> None:
        self.codes, self.absmax, self.absmax_scale, self.absmax_offset = data
        self.first_block, self.whole = first_block, whole

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        return run_dense(QuantizedShard, func, args, kwargs or {}) if result is NotImplemented else result

    storage = QuantizedTensor.storage

    @property
    def data_4bit(self) -> nf4.QuantizedData:
        return nf4.QuantizedData(self.codes, self.absmax, self.absmax_scale, self.absmax_offset)

    @property
    def quant_type(self) -> str:
        return self.whole.quant_type

    @property
    def block_size(self) -> int:
        return self.whole.block_size

    @property
    def double_quant(self) -> bool:
        return self.absmax_scale is not None

    @property
    def transposed(self) -> bool:
        return False

    @property
    def per_expert(self) -> bool:
        return self.whole.per_expert

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, the weight's second-level scales among them."""
        return sum(part.numel() * part.element_size() for part in self.data_4bit if part is not None)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The dense rows, bit for bit those of the weight's `dequantize()`."""
        layout = self.whole
        rest = tuple(self.shape), layout.quant_type, layout.block_size, layout.dtype
        if layout.per_expert:
            scales = [part for part in self.data_4bit[1:] if part is not None]
            return torch.ops.qlora.dequantize_experts(self.codes, scales, *rest)
        absmax = nf4.dequantize_scales(self.absmax, self.absmax_scale, self.absmax_offset, first=int(self.first_block))
        return torch.ops.qlora.dequantize_4bit(self.codes, absmax, None, None, *rest)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedShard({tuple(self.shape)} of {self.whole.shape}, {self.dtype}, device='{self.device}')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        data = tuple(None if part is None else part.clone() for part in self.data_4bit)  # not the whole buffers
        return _rebuild, (data, self.first_block, tuple(self.whole), tuple(self.shape))

    def _with(self, shape: tuple[int, ...] | None = None) -> QuantizedShard:
        return QuantizedShard(self.data_4bit, self.first_block, self.whole, shape or tuple(self.shape))

    def _map(self, function: Part) -> QuantizedShard:
        data = nf4.QuantizedData(*(None if part is None else function(part) for part in self.data_4bit))  # type: ignore[arg-type]
        return QuantizedShard(data, self.first_block.clone(), self.whole, tuple(self.shape))

    # --- FSDP2's extension points ---

    @property
    def _travelling(self) -> tuple[str, ...]:
        """What is gathered; tensors of 4-byte values first, where all go into one buffer."""
        if not self.per_expert:
            return "absmax", "codes"
        return ("absmax_offset", "absmax_scale", "absmax", "codes") if self.double_quant else ("absmax", "codes")

    def _shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of each of them, for so many rows (or experts)."""
        if self.per_expert:
            return {name: (rows, *getattr(self, name).shape[1:]) for name in self._travelling}
        values = rows * self.whole.shape[1]
        return {"absmax": (-(-values // self.whole.block_size),), "codes": ((values + 1) // 2,)}

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """-> (absmax and codes of ceil(N / ranks) rows, the last rank's padded; what `fsdp_post_all_gather` needs)."""
        shapes = self._shapes(-(-self.whole.shape[0] // mesh.size()))
        parts = tuple(_padded(getattr(self, name), shape) for name, shape in shapes.items())
        if mesh.size() == 1:  # FSDP2 (torch 2.13) takes only the first tensor along where there is nothing to gather
            parts = (torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]),)
        return parts, None if self.per_expert else (self.absmax_scale, self.absmax_offset)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Gathered bytes -> the QuantizedTensor over them; with `out`, the one that lies over them already."""
        if out is not None:
            if metadata is not None:
                out.absmax_scale, out.absmax_offset = metadata  # type: ignore[attr-defined]
            return None
        shapes = self._shapes(self.whole.shape[0])
        if len(outputs) < len(shapes):
            sizes = [math.prod(shape) * getattr(self, name).element_size() for name, shape in shapes.items()]
            outputs = outputs[0].split(sizes)
        found: dict[str, Any] = {"absmax_scale": None, "absmax_offset": None}
        if metadata is not None:
            found["absmax_scale"], found["absmax_offset"] = metadata
        for (name, shape), part in zip(shapes.items(), outputs, strict=True):
            flat = part.view(getattr(self, name).dtype).view(-1)
            found[name] = flat[: math.prod(shape)].view(shape)
        data = nf4.QuantizedData(found["codes"], found["absmax"], found["absmax_scale"], found["absmax_offset"])
        return QuantizedTensor(data, self.whole._replace(dtype=param_dtype)), ()


def stored_form(weight: object) -> QuantizedTensor | QuantizedShard | None:
    """The 4-bit tensor that a weight is, or that this rank's part of it is; None for a dense weight."""
    local = getattr(weight, "_local_tensor", weight)  # of a DTensor
    return local if isinstance(local, (QuantizedTensor, QuantizedShard)) else None


def _padded(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(part.shape) == shape:
        return part
    return torch.cat([part, part.new_zeros((shape[0] - part.shape[0], *shape[1:]))])


def _rebuild(data: Any, first_block: Tensor, whole: tuple[Any, ...], shape: tuple[int, ...]) -> QuantizedShard:
    return QuantizedShard(nf4.QuantizedData(*data), first_block, Layout(*whole), shape)


torch.serialization.add_safe_globals([_rebuild])


from . import sharding_ops  # noqa: E402, F401  the ops that split, fill and show shards
