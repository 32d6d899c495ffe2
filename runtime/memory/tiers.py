"""The host tiers: where pages are while they are not on the device. RAM (pinned for CUDA), or a memory-mapped file.

Every tier hands out slots of one page. Disk space is reserved before a slot is handed out: a memory map over a hole
of a full disk kills the process when it is written.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import MemoryBudgetError
from .budget import format_bytes

_FILE_PAGES, _RAM_PAGES = 64, 16  # of an extent


class HostTier(Protocol):
    """Slots of one page each."""

    kind: str
    used_bytes: int

    def allocate(self) -> int | None:
        """A free slot; None where the tier's limit is reached. Raises MemoryBudgetError where the system refuses."""

    def free(self, slot: int) -> None:
        """Give a slot back."""

    def view(self, slot: int) -> Tensor:
        """The slot's bytes, uint8 [page_bytes]."""

    def close(self) -> None:
        """Give everything back."""


@dataclass
class _Extent:
    """Several slots in one piece of memory, and how many of them are in use."""

    slots: range
    used: int = 0


class RamTier:
    """Main memory, page-locked where the device is a GPU.

    It is asked for in extents of several pages: page-locking takes a call each, and one large piece is mapped for the
    device in larger steps. An extent goes back when its last slot is free.
    """

    kind = "ram"

    def __init__(self, page_bytes: int, limit: int | None, pinned: bool) -> None:
        self.page_bytes, self.limit, self.pinned = page_bytes, limit, pinned
        self.used_bytes = 0
        self._slots: dict[int, tuple[Tensor, _Extent]] = {}
        self._free: list[int] = []
        self._next = 0

    def allocate(self) -> int | None:
        if self.limit is not None and self.used_bytes + self.page_bytes > self.limit:
            return None
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slots[slot][1].used += 1
        self.used_bytes += self.page_bytes
        return slot

    def _grow(self) -> None:
        """One more extent, or a single page where there is no room for more."""
        most = _RAM_PAGES if self.limit is None else (self.limit - self.used_bytes) // self.page_bytes
        # torch page-locks a power of two, whatever it is asked for
        for pages in (1 << min(_RAM_PAGES, most).bit_length() - 1, 1):
            try:
                size = pages * self.page_bytes
                whole = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned, device="cpu")
                break
            except (RuntimeError, MemoryError) as error:
                if pages > 1:
                    continue
                raise MemoryBudgetError(
                    f"There is no host memory left for a page of {format_bytes(self.page_bytes)} "
                    f"({format_bytes(self.used_bytes)} are in use): give a folder for pages, or a larger device budget."
                ) from error
        extent = _Extent(range(self._next, self._next + pages))
        self._slots |= {slot: (view, extent) for slot, view in zip(extent.slots, whole.split(self.page_bytes))}
        self._free.extend(reversed(extent.slots))
        self._next += pages

    def free(self, slot: int) -> None:
        extent = self._slots[slot][1]
        extent.used -= 1
        self._free.append(slot)
        self.used_bytes -= self.page_bytes
        if not extent.used:
            self._free = [other for other in self._free if other not in extent.slots]
            for other in extent.slots:
                del self._slots[other]

    def view(self, slot: int) -> Tensor:
        return self._slots[slot][0]

    def close(self) -> None:
        self._slots.clear()
        self._free.clear()
        self.used_bytes = 0


class FileTier:
    """A nameless file in `folder`, mapped into memory piece by piece; it is gone when the process is, however that ends."""

    kind = "file"

    def __init__(self, folder: Path, page_bytes: int, limit: int | None) -> None:
        self.folder, self.page_bytes, self.limit = folder, page_bytes, limit
        self.used_bytes = 0
        self._views: list[Tensor] = []
        self._places: list[tuple[mmap.mmap, int]] = []  # by slot
        self._free: list[int] = []
        self._holes: set[int] = set()  # free ones whose blocks the disk has back
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(prefix="qlora_pages_", dir=folder)  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise MemoryBudgetError(
                f"The folder for pages {folder} cannot be written ({error.strerror or error}): choose another one."
            ) from error

    def allocate(self) -> int | None:
        if self.limit is not None and self.used_bytes + self.page_bytes > self.limit:
            return None
        if not self._free:
            self._grow()
        slot = self._free[-1]
        if slot in self._holes:
            try:
                _reserve(self._file.fileno(), slot * self.page_bytes, self.page_bytes)
            except OSError as error:
                raise self._full(error) from error
            self._holes.remove(slot)
        self.used_bytes += self.page_bytes
        return self._free.pop()

    def _grow(self) -> None:
        """Reserve and map one more extent, or a single page where the disk holds no more than that."""
        for pages in (_FILE_PAGES, 1):
            size, start = pages * self.page_bytes, len(self._views) * self.page_bytes
            try:
                _reserve(self._file.fileno(), start, size)
                mapped = mmap.mmap(self._file.fileno(), size, offset=start)
                break
            except OSError as error:
                os.ftruncate(self._file.fileno(), start)
                if pages > 1 and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    continue
                raise self._full(error) from error
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        self._free.extend(range(len(self._views) + pages - 1, len(self._views) - 1, -1))
        self._views.extend(whole.split(self.page_bytes))
        self._places.extend((mapped, place) for place in range(0, size, self.page_bytes))

    def _full(self, error: OSError) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"There is no room for another page of {format_bytes(self.page_bytes)} in {self.folder} "
            f"({error.strerror or error}): free some space there, choose another folder, or give a larger device budget."
        )

    def free(self, slot: int) -> None:
        self._free.append(slot)
        self.used_bytes -= self.page_bytes
        if hasattr(mmap, "MADV_REMOVE"):  # Linux
            mapped, place = self._places[slot]
            with contextlib.suppress(OSError):  # a file system without holes keeps the blocks, for the next page
                mapped.madvise(mmap.MADV_REMOVE, place, self.page_bytes)
                self._holes.add(slot)

    def view(self, slot: int) -> Tensor:
        return self._views[slot]

    def close(self) -> None:
        self._views.clear()
        self._places.clear()
        self._free.clear()
        self._file.close()
        self.used_bytes = 0


def _reserve(descriptor: int, start: int, size: int) -> None:
    """Blocks of the disk for bytes [start, start + size). Raises OSError where there are none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, start, size)
        return
    zeros = bytes(1 << 20)  # no such call on macOS: written once
    for at in range(start, start + size, len(zeros)):
        os.pwrite(descriptor, zeros[: min(len(zeros), start + size - at)], at)
