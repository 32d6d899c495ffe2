"""How the optimizer state of one parameter lies in its pages, and how it is read from there and written back.

A span holds, one after the other (n elements, nb = n / 256 rounded up):

    32-bit   first [n] second [n]                                                        fp32
    8-bit    first codes [256 nb], second codes [256 nb], first scales [nb], second scales [nb]
    then, for a bf16 or fp16 parameter, its fp32 master [n]

`first` is the mean of gradients, `second` (AdamW only) that of their squares. Blocks of 256 and the two dynamic maps
are bitsandbytes'; so is the rule that a parameter of less than 4096 elements keeps 32-bit states.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nf4 import dynamic_map
from .memory import Allocation, PagePool, Span

BLOCK = 256
MIN_8BIT_NUMEL = 4096
FIELDS = ("first", "second", "master")
Views = dict[str, Tensor]


@dataclass(frozen=True)
class StateLayout:
    """`lion`: no second moment; `narrow`: 8-bit; `master`: the parameter is bf16 or fp16."""

    lion: bool
    narrow: bool
    master: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """What is kept per element."""
        return tuple(f for f in FIELDS if not (f == "second" and self.lion) and not (f == "master" and not self.master))

    @property
    def unit(self) -> int:
        """Elements of an item, which no page border cuts."""
        return BLOCK if self.narrow else 1

    @property
    def item_bytes(self) -> int:
        """Bytes of an item."""
        moments = (1 if self.lion else 2) * (self.unit + 4 if self.narrow else 4)
        return moments + (4 * self.unit if self.master else 0)

    def count(self, span: Span, numel: int) -> int:
        """Elements of a span: the last item may be cut short."""
        return min(span.count * self.unit, numel - span.first * self.unit)

    def views(self, span: Span, numel: int) -> Views:
        """Tensors over the span's bytes on the device: by field, and for 8-bit states by field + " scales"."""
        assert span.page.buffer is not None
        raw = span.page.buffer[span.offset : span.offset + span.count * self.item_bytes]
        count, at = self.count(span, numel), 0

        def take(length: int, dtype: torch.dtype) -> Tensor:
            nonlocal at
            start, at = at, at + length * dtype.itemsize
            return raw[start:at].view(dtype)

        moments = self.fields[: 1 if self.lion else 2]
        views = {}
        for field in moments:
            if self.narrow:
                views[field] = take(span.count * BLOCK, torch.uint8)[:count]
            else:
                views[field] = take(count, torch.float32)
        for field in moments if self.narrow else ():
            views[f"{field} scales"] = take(span.count, torch.float32)
        if self.master:
            views["master"] = take(count, torch.float32)
        return views


@dataclass
class ParamState:
    """The state of one parameter: `step` updates so far, and where the rest is."""

    layout: StateLayout
    numel: int
    allocation: Allocation
    owner: weakref.ref
    dtype: torch.dtype  # of the parameter
    step: int = 0

    @property
    def spans(self) -> list[Span]:
        """Where it lies."""
        return self.allocation.spans

    def read(self, pool: PagePool) -> Views:
        """Copies of everything, whole and flat, on the CPU."""
        layout, found = self.layout, {}
        blocks = -(-self.numel // BLOCK)
        for field in layout.fields:
            narrow = layout.narrow and field != "master"
            found[field] = torch.empty(self.numel, dtype=torch.uint8 if narrow else torch.float32, device="cpu")
            if narrow:
                found[f"{field} scales"] = torch.empty(blocks, dtype=torch.float32, device="cpu")
        for span in self.allocation.spans:
            with pool.on_device([span.page], writes=False):
                for name, view in layout.views(span, self.numel).items():
                    self._part(found, name, span).copy_(view)
        return found

    def write(self, pool: PagePool, values: Views) -> None:
        """`read`'s reverse; fields that `values` lacks stay as they are (zeros in a new state)."""
        for span in self.allocation.spans:
            with pool.on_device([span.page]):
                for name, view in self.layout.views(span, self.numel).items():
                    if name in values:
                        view.copy_(self._part(values, name, span))

    def _part(self, values: Views, name: str, span: Span) -> Tensor:
        unit = 1 if name.endswith(" scales") else self.layout.unit
        return values[name][span.first * unit : (span.first + span.count) * unit]


def layout_for(parameter: Tensor, *, lion: bool, state_bits: int) -> StateLayout:
    """The layout of a parameter's state."""
    narrow = state_bits == 8 and parameter.numel() >= MIN_8BIT_NUMEL
    return StateLayout(lion=lion, narrow=narrow, master=parameter.dtype != torch.float32)


def quantize_blocks(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Flat fp32 [n] -> codes uint8 [n] and scales fp32 [nb], to the nearest code; bounds belong to the lower one."""
    blocks = -(-values.numel() // BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * BLOCK - values.numel())).view(blocks, BLOCK)
    scales = padded.abs().amax(1)
    scaled = padded * scales.clamp(min=1e-38).reciprocal()[:, None]
    codes = torch.bucketize(scaled, _bounds(signed, values.device)).to(torch.uint8)
    return codes.view(-1)[: values.numel()], scales


def dequantize_blocks(codes: Tensor, scales: Tensor, code_map: Tensor) -> Tensor:
    """code_map[codes] * scale of the block, fp32 [n]."""
    return code_map.to(codes.device)[codes.view(-1).int()] * scales.repeat_interleave(BLOCK)[: codes.numel()]


def signed_map(field: str) -> bool:
    """The mean has a sign, the mean of squares has none."""
    return field == "first"


@functools.cache
def map_on(signed: bool, device: torch.device) -> Tensor:
    """The dynamic map, once for each device: a copy from the host would wait for all that the device has to do."""
    return dynamic_map(signed).to(device)


@functools.cache
def _bounds(signed: bool, device: torch.device) -> Tensor:
    values = dynamic_map(signed)
    return ((values[:-1] + values[1:]) / 2).to(device)
