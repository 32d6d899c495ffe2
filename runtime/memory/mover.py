"""The moves themselves: buffers of the device tier, slots of the host tiers, and the copies between them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MemoryBudgetError, ModelStateError
from .budget import format_bytes, parse_bytes
from .page import Page
from .statistics import PoolStatistics
from .stream_copier import make_copier
from .tiers import FileTier, HostTier, RamTier

MOST_TOGETHER = 8  # pages that come with one event: the first of more would be waited for until the last is there


class Mover:
    """Does what the pool decides, in the order it decides it, and counts bytes as they really move."""

    def __init__(
        self,
        device: torch.device,
        page_bytes: int,
        folder: str | Path | None,
        host_budget: int | str | None,
        lock: threading.RLock,
        counts: PoolStatistics,
        trace: Callable[[str, Page | None], None],
    ) -> None:
        self.page_bytes = page_bytes
        self.copier = make_copier(device)
        self.background = False  # nothing moves without a budget: then there is no thread
        self._lock, self._counts, self._trace = lock, counts, trace
        # buffers that no page is in, that of the first to leave first; `Page.used` of the last one that was
        self._spare: deque[tuple[Tensor, Any]] = deque()
        self._lost: BaseException | None = None  # why a page could not leave
        self._tiers: list[HostTier] = []
        if host_budget is None and folder is not None:
            host_budget = 0
        if host_budget != 0:
            limit = None if host_budget is None else parse_bytes(host_budget)
            self._tiers.append(RamTier(page_bytes, limit, self.copier.pinned))
        if folder is not None:
            self._tiers.append(FileTier(Path(folder), page_bytes, None))
        if not self._tiers:
            raise MemoryBudgetError(
                "host_budget is 0 and no folder is given, so pages have nowhere to go: give either."
            )

    @property
    def has_file(self) -> bool:
        """Whether one of the host tiers is a file."""
        return any(tier.kind == "file" for tier in self._tiers)

    def reserve_slots(self, pages: Sequence[Page]) -> None:
        """A place in a host tier for each page. Raises MemoryBudgetError, nothing reserved, where one finds none."""
        taken: list[Page] = []
        try:
            for page in pages:
                if page.slot is None:
                    page.slot = self._new_slot()
                    taken.append(page)
        except MemoryBudgetError:
            for page in taken:
                self._free_slot(page)
            raise

    def _new_slot(self) -> tuple[int, int]:
        for index, tier in enumerate(self._tiers):
            slot = tier.allocate()
            if slot is not None:
                return index, slot
        used = sum(tier.used_bytes for tier in self._tiers)
        raise MemoryBudgetError(
            f"The host memory for pages is full ({format_bytes(used)} in use): raise host_budget, give a folder for "
            "pages, or a larger device budget."
        )

    def _free_slot(self, page: Page) -> None:
        if page.slot is not None:
            tier, slot = page.slot
            self._tiers[tier].free(slot)
            page.slot = None

    def _slot(self, page: Page) -> tuple[Tensor, bool]:
        """A page's memory in a host tier, and whether that is a file's."""
        assert page.slot is not None
        tier, slot = page.slot
        return self._tiers[tier].view(slot), self._tiers[tier].kind == "file"

    def used_bytes(self, kind: str) -> int:
        """Of the host tiers of a kind, "ram" or "file"."""
        return sum(tier.used_bytes for tier in self._tiers if tier.kind == kind)

    def send_out(self, pages: Sequence[Page]) -> None:
        """Queue device -> host; the copy is left out where nothing was written since a page came."""
        leaving = [(page, page.dirty) for page in pages]
        for page in pages:
            page.dirty = False
        if leaving:
            self._run(self._pages_out, leaving)

    def bring(self, pages: Sequence[Page]) -> None:
        """Queue host -> device, or zeros for a page that is stored nowhere. Without a budget: RuntimeError or MemoryError
        where the device has no memory, and those before have come."""
        if not self._in_place:
            for page in pages:
                page.coming = self.copier.submit(self._pages_in, [page])
            return
        for page in pages:
            page.coming = None
        for first in range(0, len(pages), MOST_TOGETHER):
            self._pages_in(pages[first : first + MOST_TOGETHER], told_later=self.background)

    def discard(self, page: Page) -> None:
        """Queue the end of a page."""
        self._run(self._discard, page)

    def forget(self, page: Page) -> None:
        """Queue taking the page's buffer away, without a copy."""
        self._run(self._forget, page)

    def drop_spare(self) -> None:
        """Queue giving buffers without a page back to the system."""
        self._run(self._drop_spare)

    @property
    def _in_place(self) -> bool:
        """Whether the caller itself does a job: nothing moves yet, or it only queues copies between memories."""
        if self.copier.only_queues and not self.has_file:
            return True
        return not self.background and not self.copier.started

    def _run(self, job: Callable[..., None], *args: Any) -> None:
        if self._in_place:
            job(*args)
        else:
            self.copier.submit(job, *args)

    # --- from here on, on the copier's thread, if it has one ----------------------------------------------------------

    def _pages_in(self, pages: Sequence[Page], told_later: bool = False) -> None:
        """`told_later`: what keeps a page from coming is told to whoever waits for it."""
        failed: dict[Page, Exception] = {}
        there: list[Page] = []
        for page in pages:
            if self._does(self._give_buffer, page, failed):
                there.append(page)
            elif not told_later:
                break
        with self.copier.coming():
            for page in there:
                if not self._does(self._fill, page, failed):
                    with self._lock:
                        self._set_aside(page)  # what its buffer holds is another page's
        for page, error in failed.items():
            if not told_later:
                raise error
            page.coming = Future()
            page.coming.set_exception(error)

    @staticmethod
    def _does(job: Callable[[Page], None], page: Page, failed: dict[Page, Exception]) -> bool:
        """Whether the job was done; why not is put into `failed`."""
        try:
            job(page)
            return True
        except (RuntimeError, MemoryError, ModelStateError) as error:
            failed[page] = error
            return False

    def _give_buffer(self, page: Page) -> None:
        if self._lost is not None:
            raise ModelStateError(
                f"A page of optimizer state was lost on its way to the host ({self._lost}): go on from a checkpoint."
            ) from self._lost
        with self._lock:
            buffer, used = self._spare.popleft() if self._spare else (None, None)
        if buffer is not None:
            self.copier.wait_for(used)
        else:
            buffer = self.copier.empty(page.size)
            with self._lock:
                self._counts.device_bytes += page.size
                self._counts.peak_device_bytes = max(self._counts.peak_device_bytes, self._counts.device_bytes)
        page.buffer = buffer

    def _fill(self, page: Page) -> None:
        if not page.stored:
            self.copier.zero(page)
            return
        self.copier.read(page, *self._slot(page))
        with self._lock:
            self._counts.moved_in_bytes += page.size
            self._trace("page_in", page)

    def _pages_out(self, leaving: Sequence[tuple[Page, bool]]) -> None:
        """Pages, and whether they were written since they came."""
        # one without a buffer: the copy that should have brought it failed, and whoever asked for it was told
        left = [(page, dirty or not page.stored) for page, dirty in leaving if page.buffer is not None]
        try:
            with self.copier.leaving():
                for page, written in left:
                    if written:
                        self.copier.write(page, *self._slot(page))
        except (RuntimeError, MemoryError) as error:
            self._lost = error  # told to whoever waits for a page next: nobody waits for these
            return
        with self._lock:
            for page, written in left:
                page.stored = True
                self._set_aside(page)
                self._counts.moved_out_bytes += page.size if written else 0
                self._trace("page_out", page)

    def _forget(self, page: Page) -> None:
        with self._lock:
            page.stored = False
            buffer, page.buffer = page.buffer, None
            if buffer is None:
                return
            if _seen_elsewhere(buffer):  # a view of it lives on: that memory is its holder's now
                self._counts.device_bytes -= page.size
            else:
                page.buffer = buffer
                self._set_aside(page)

    def _set_aside(self, page: Page) -> None:
        assert page.buffer is not None
        self._spare.append((page.buffer, page.used))
        page.buffer = page.used = None

    def _discard(self, page: Page) -> None:
        with self._lock:
            if page.buffer is not None:
                page.buffer = None
                self._counts.device_bytes -= page.size
            self._free_slot(page)

    def _drop_spare(self) -> None:
        with self._lock:
            self._counts.device_bytes -= len(self._spare) * self.page_bytes
            self._spare.clear()

    def close(self) -> None:
        """Wait for the copies, and give everything back."""
        self.copier.close()
        self._spare.clear()
        for tier in self._tiers:
            tier.close()


def _seen_elsewhere(buffer: Tensor) -> bool:
    """Whether another tensor than `buffer` stands on its storage (which is then held by it, too, and by this look)."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) > 2
