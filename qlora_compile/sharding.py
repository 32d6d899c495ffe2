"""QuantizedTensor -> `QuantizedShard`, the rows of one rank, and back: what FSDP2 (`fully_shard`) asks of a 4-bit weight.

FSDP2 splits a parameter's rows over the ranks, keeps each rank's part as a DTensor, and gathers it before use:

    QuantizedTensor --split--> QuantizedShard --fsdp_pre_all_gather--> bytes --all-gather--> QuantizedTensor

Codes and block scales travel as uint8, never as a view in a floating-point type (hardware and libraries may change the
payload of a NaN: bitsandbytes#1945 lost 0.1% of its weights so), and a quarter of the bytes of a bf16 weight. The
second-level scales (4 bytes for 16,384 weights) are the same on every rank and do not travel.

Rows are split where a block of scales ends. N rows of K values in blocks of B, on R ranks: ceil(N / R) * K must be a
multiple of B; the last shards may be shorter, or empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import nf4
from .tensor import Layout, QuantizedTensor, run_dense

Part = Callable[[Tensor], Tensor]
HANDLERS: dict[Any, Callable[..., Any]] = {}  # of ops on shards; filled by sharding_ops


class QuantizedShard(torch.Tensor):
    """Rows of a 4-bit weight, as they are stored in it. `dequantize()` gives these rows; unknown ops get them dense.

    `codes` and `absmax` are those of the rows (views of the weight's, or of a padded buffer); `absmax_scale` and
    `absmax_offset` those of the whole weight. `first_block` is the number of the first block in the weight, int64 [] on
    the CPU: a tensor, so that a shard that is filled through a view of it knows. `whole` describes the weight.
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
        return False

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, the weight's second-level scales among them."""
        return sum(part.numel() * part.element_size() for part in self.data_4bit if part is not None)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The dense rows, bit for bit those of the weight's `dequantize()`."""
        scales = nf4.dequantize_scales(self.absmax, self.absmax_scale, self.absmax_offset, first=int(self.first_block))
        layout = self.whole
        return torch.ops.qlora.dequantize_4bit(
            self.codes, scales, None, None, tuple(self.shape), layout.quant_type, layout.block_size, layout.dtype
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedShard({tuple(self.shape)} of {self.whole.shape}, {self.dtype}, device='{self.device}')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        codes, absmax = self.codes.clone(), self.absmax.clone()  # or the whole buffer would be written
        data = (codes, absmax, self.absmax_scale, self.absmax_offset)
        return _rebuild, (data, self.first_block, tuple(self.whole), tuple(self.shape))

    def _with(self, shape: tuple[int, ...] | None = None) -> QuantizedShard:
        return QuantizedShard(self.data_4bit, self.first_block, self.whole, shape or tuple(self.shape))

    def _map(self, function: Part) -> QuantizedShard:
        data = nf4.QuantizedData(*(None if part is None else function(part) for part in self.data_4bit))  # type: ignore[arg-type]
        return QuantizedShard(data, self.first_block.clone(), self.whole, tuple(self.shape))

    # --- FSDP2's extension points ---

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Any]:
        """-> (absmax and codes of ceil(N / ranks) rows, the last rank's padded; what `fsdp_post_all_gather` needs)."""
        rows = -(-self.whole.shape[0] // mesh.size())
        values = rows * self.whole.shape[1]
        absmax, codes = self.absmax, self.codes
        if mesh.size() == 1:  # FSDP2 (torch 2.13) takes only the first tensor along where there is nothing to gather
            parts: tuple[Tensor, ...] = (torch.cat([absmax.view(torch.uint8), codes]),)
        else:
            parts = _padded(absmax, values // self.whole.block_size), _padded(codes, values // 2)
        return parts, (self.absmax_scale, self.absmax_offset)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """Gathered bytes -> the QuantizedTensor over them; with `out`, the one that lies over them already."""
        if out is not None:
            weight = cast(QuantizedTensor, out)
            weight.absmax_scale, weight.absmax_offset = metadata
            return None
        numel = self.whole.shape[0] * self.whole.shape[1]
        blocks = -(-numel // self.whole.block_size)
        if len(outputs) == 1:
            length = blocks * self.absmax.element_size()
            absmax, codes = outputs[0][:length].view(self.absmax.dtype), outputs[0][length:]
        else:
            absmax, codes = outputs
        data = nf4.QuantizedData(codes[: (numel + 1) // 2], absmax[:blocks], *metadata)
        return QuantizedTensor(data, self.whole._replace(dtype=param_dtype)), ()


def stored_form(weight: object) -> QuantizedTensor | QuantizedShard | None:
    """The 4-bit tensor that a weight is, or that this rank's part of it is; None for a dense weight."""
    local = getattr(weight, "_local_tensor", weight)  # of a DTensor
    return local if isinstance(local, (QuantizedTensor, QuantizedShard)) else None


def _padded(part: Tensor, length: int) -> Tensor:
    return part if part.numel() == length else torch.nn.functional.pad(part, (0, length - part.numel()))


def _rebuild(data: Any, first_block: Tensor, whole: tuple[Any, ...], shape: tuple[int, ...]) -> QuantizedShard:
    return QuantizedShard(nf4.QuantizedData(*data), first_block, Layout(*whole), shape)


torch.serialization.add_safe_globals([_rebuild])


from . import sharding_ops  # noqa: E402, F401  the ops that split, fill and show shards
