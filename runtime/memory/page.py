"""Pages and what lies in them: spans of whole items, handed out first fit; small tensors share a page."""

from __future__ import annotations

import enum
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ALIGNMENT = 64  # bytes; a cache line, so that no two spans share one


class Where(enum.Enum):
    """Where a page is, or will be once the copies queued so far are done."""

    NEW = "new"  # nothing written yet: its visit to the device begins with zeros
    DEVICE = "device"
    HOST = "host"
    FREED = "freed"


@dataclass(eq=False)
class Page:
    """One fixed-size piece of memory. `buffer` is its place in the device tier, `slot` its place in a host tier."""

    number: int
    size: int
    share: object  # only allocations with an equal key come into this page
    where: Where = Where.NEW
    buffer: Tensor | None = None
    slot: tuple[int, int] | None = None  # (tier, place in it), kept from the first time that it has to leave the device
    stored: bool = False  # the slot holds what it held when it left; until then its contents are zeros where it comes
    dirty: bool = True  # written since it came
    pins: int = 0
    coming: Future | None = None
    arrived: Any = None  # CUDA events: the copy to the device is done
    used: Any = None  # the last kernel, or copy, that read its buffer is done
    left: Any = None  # the copy to its slot is done
    spans: int = 0
    holes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holes = [(0, self.size)]

    def take(self, size: int) -> int | None:
        """The offset of `size` free bytes, now taken; None where there is no such hole."""
        size = _aligned(size)
        for index, (start, length) in enumerate(self.holes):
            if length >= size:
                rest = [(start + size, length - size)] if length > size else []
                self.holes[index : index + 1] = rest
                self.spans += 1
                return start
        return None

    def give_back(self, offset: int, size: int) -> None:
        """`take`'s reverse; neighbouring holes become one."""
        self.spans -= 1
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self.holes, (offset, _aligned(size))]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self.holes = merged

    def largest_hole(self) -> int:
        """Bytes."""
        return max((length for _, length in self.holes), default=0)


@dataclass(frozen=True, eq=False)
class Span:
    """Items `first` to `first + count` of an allocation, at `offset` bytes of `page`."""

    page: Page
    offset: int
    first: int
    count: int


@dataclass(eq=False)
class Allocation:
    """What belongs to one tensor: `items` of `item_bytes` each, over one page or several."""

    items: int
    item_bytes: int
    spans: list[Span]

    @property
    def pages(self) -> list[Page]:
        """Every page once, in order."""
        return list(dict.fromkeys(span.page for span in self.spans))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
