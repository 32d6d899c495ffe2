"""The page pool: pages move between the device tier and the host tiers so that a byte budget of the device holds.

    pool.allocate(owner, items, item_bytes) -> spans of pages     (no memory yet: a page exists from its first use)
    with pool.on_device(pages): ...                               brought in, and kept there until the block ends
    pool.prefetch(pages)                                          brought in meanwhile, as far as there is room

A page that is needed and is not there displaces the one that was used longest ago. Copies run in the order asked for,
so a page's buffer has left before another one takes its place, and the bytes on the device are never above the budget.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from ...errors import MemoryBudgetError
from ...interruption import whole
from .budget import check_budget, check_page_bytes, format_bytes, page_bytes_for, parse_bytes
from .mover import Mover
from .page import Allocation, Page, Where
from .residency import Residency
from .statistics import PoolStatistics, Trace
from .table import PageTable

GRADIENTS = "gradients"  # (GRADIENTS, ...) as `share`: pages that `gradient_bytes` counts


class PagePool:
    """Pages of one size for one device.

    `budget` bounds the device tier (bytes or "24GiB"; None: nothing is ever moved). Pages that do not fit are in RAM, or
    in a file in `folder` if one is given; with both `folder` and `host_budget`, in so much RAM first. Thread-safe.
    Raises MemoryBudgetError for a budget that cannot work and for a folder that cannot be written.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        budget: int | str | None = None,
        *,
        page_bytes: int | None = None,
        folder: str | Path | None = None,
        host_budget: int | str | None = None,
    ) -> None:
        self.device = torch.device(device)
        wanted = None if budget is None else parse_bytes(budget)
        self.page_bytes = page_bytes_for(wanted) if page_bytes is None else check_page_bytes(page_bytes)
        check_budget(wanted, self.page_bytes)
        self._lock = threading.RLock()
        # held by a sweep, which counts on the budget from its start; taken before `_lock`, never after it
        self.steady = threading.RLock()
        self._counts = PoolStatistics(page_bytes=self.page_bytes)
        self._trace = Trace()
        self.events = self._trace.events
        self._mover = Mover(self.device, self.page_bytes, folder, host_budget, self._lock, self._counts, self._trace)
        self._mover.background = wanted is not None
        self._table = PageTable(self.page_bytes, self._trace)
        self._resident = Residency(wanted)
        self._doomed: deque[Allocation] = deque()  # their owners are gone; freed at the next call

    # --- allocation ---------------------------------------------------------------------------------------------------

    def allocate(self, owner: object, items: int, item_bytes: int, share: object = None) -> Allocation:
        """Room for `items` whole items, freed when `owner` is; only allocations with an equal `share` share a page."""
        with self._lock:
            self._reap()
            allocation = self._table.allocate(items, item_bytes, share)
        # weakly: an owner that outlives the pool does not keep its pages
        weakref.finalize(owner, _doom, weakref.ref(self), weakref.ref(allocation)).atexit = False
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Give an allocation back before its owner is gone. Twice is the same as once."""
        with whole, self._lock:
            for page in self._table.free(allocation):
                if page in self._resident:
                    self._resident.remove(page, Where.FREED)
                page.where = Where.FREED
                self._mover.discard(page)
                self._trace("free", page)

    def _reap(self) -> None:
        while self._doomed:
            self.free(self._doomed.popleft())

    # --- residency ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def on_device(self, pages: Sequence[Page], *, writes: bool = True) -> Iterator[None]:
        """Bring pages in, wait for them, and keep them on the device until the block ends.

        Raises MemoryBudgetError, with nothing changed, where they do not fit the budget together or the pages that
        have to leave find no room in the host tiers.
        """
        self.acquire(pages)
        try:
            yield
        finally:
            self.release(pages, wrote=writes)

    @whole
    def acquire(self, pages: Sequence[Page]) -> None:
        """`on_device` without an end: each page stays until `release`."""
        with self._lock:
            self._reap()
            for page in pages:
                page.pins += 1
        try:
            with self._lock:
                self._bring_all(pages)
            self._wait(pages)
        except BaseException:
            with self._lock:
                for page in pages:
                    page.pins -= 1
            raise

    def _bring_all(self, pages: Sequence[Page]) -> None:
        missing = [page for page in pages if page.where is not Where.DEVICE]
        self._counts.hits += len(pages) - len(missing)
        self._counts.misses += sum(page.where is not Where.NEW for page in missing)
        self._send_out(self._resident.victims_for(sum(page.size for page in missing)))
        self._resident.add(missing)
        try:
            self._mover.bring(missing)
        except (RuntimeError, MemoryError) as error:
            for page in [page for page in missing if page.buffer is None]:
                self._resident.remove(page, Where.HOST if page.stored else Where.NEW)
            raise self._no_memory(missing[0]) from error
        for page in pages:
            self._resident.touch(page)

    def _wait(self, pages: Sequence[Page]) -> None:
        for page in pages:
            coming = page.coming
            if coming is not None:
                started = time.perf_counter()
                waiting = not coming.done()
                self._finish(page, coming)
                if waiting:
                    ms = (time.perf_counter() - started) * 1e3
                    with self._lock:
                        self._counts.stalls += 1
                        self._counts.stall_ms += ms
                        self._trace("stall", page)
        self._mover.copier.ready(pages)

    def _finish(self, page: Page, coming: Future) -> None:
        """Wait for a page that the caller holds. Where the device had no memory for it when it was asked for, it is asked
        for once more, in the place of a page that nobody holds."""
        try:
            coming.result()
        except (RuntimeError, MemoryError):
            with self._lock:
                if page.coming is coming:
                    self._send_out(self._resident.victims(page.size)[0])
                    self._mover.bring([page])
                again = page.coming
            try:
                if again is not None:  # None: another thread was here meanwhile
                    again.result()
            except (RuntimeError, MemoryError) as error:
                with self._lock:
                    if page in self._resident and page.coming is again:
                        self._resident.remove(page, Where.HOST if page.stored else Where.NEW)
                        page.coming = None
                raise self._no_memory(page) from error
            if page not in self._resident:
                raise self._no_memory(page) from None
        page.coming = None

    def _no_memory(self, page: Page) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"There is no memory on {self.device} for a page of {format_bytes(page.size)} beside "
            f"{format_bytes(self._resident.bytes)} of others: give a device budget that leaves room."
        )

    def release(self, pages: Sequence[Page], *, wrote: bool = True) -> None:
        """The end of `acquire`; `wrote` False where the pages were only read."""
        with whole, self._lock:
            for page in pages:
                page.pins -= 1
                page.dirty |= wrote
            self._mover.copier.used(pages)
            if self._resident.excess() > 0:
                self._shrink()

    def prefetch(self, pages: Iterable[Page], *, displace: bool = True) -> int:
        """Begin to bring pages in, in this order, as far as there is room for them. Returns how many are on their way.

        With `displace` False only into room that nothing is in.
        """
        begun = 0
        with whole, self._lock:
            self._reap()
            coming: list[Page] = []  # asked for together, as long as nothing has to leave for them
            for page in pages:
                if page.where is Where.HOST:
                    if not displace and self._resident.excess(page.size) > 0:
                        break
                    try:
                        victims = self._resident.victims_for(page.size)
                        if victims:
                            self._mover.bring(coming)
                            coming = []
                            self._send_out(victims)
                    except MemoryBudgetError:
                        break  # asked for too early: it comes when it is needed, and that says what is wrong
                    self._resident.add([page])
                    coming.append(page)
                    begun += 1
                if page.where is Where.DEVICE:
                    self._resident.touch(page)
            self._mover.bring(coming)
        return begun

    def evict(self, pages: Iterable[Page] | None = None, *, keep_spare: bool = False) -> int:
        """Send pages (None: all) that nobody holds to the host tiers. Returns the bytes that leave the device.

        `keep_spare`: their memory on the device stays, for pages that come next.
        """
        with whole, self._lock:
            self._reap()
            chosen = self._resident if pages is None else pages
            leaving = [page for page in chosen if page in self._resident and page.pins == 0]
            self._send_out(leaving)
            if not keep_spare:
                self._mover.drop_spare()
            return sum(page.size for page in leaving)

    def vacate(self) -> None:
        """`evict` of all pages, as far as the host tiers have room."""
        with whole, self._lock:
            self._reap()
            leaving = [page for page in self._resident if page.pins == 0]
            try:
                self._send_out(leaving)
            except MemoryBudgetError:
                with contextlib.suppress(MemoryBudgetError):
                    for page in leaving:
                        self._send_out([page])
            self._mover.drop_spare()

    def forget(self, pages: Iterable[Page]) -> None:
        """The contents of these pages are void: those that nobody holds leave the device without a copy."""
        with whole, self._lock:
            for page in [page for page in pages if page in self._resident and page.pins == 0]:
                self._resident.remove(page, Where.NEW)
                self._mover.forget(page)

    def unheld_bytes(self) -> int | None:
        """What of the budget is not taken by pages that somebody holds; None without a budget."""
        with self._lock:
            return self._resident.unheld_bytes()

    def reserve(self, pages: Sequence[Page]) -> None:
        """Find room in the host tiers now for all of these that may have to leave the device while others are used.

        Raises MemoryBudgetError, with nothing changed: so a sweep over them cannot fail in the middle.
        """
        with self._lock:
            self._reap()
            if self.budget is not None and len(self._table.pages) * self.page_bytes > self.budget:
                self._mover.reserve_slots([*pages, *(page for page in self._resident if page.slot is None)])

    def _send_out(self, pages: Sequence[Page]) -> None:
        """Raises MemoryBudgetError, with nothing sent, where the host tiers have no room for all of them."""
        self._mover.reserve_slots(pages)
        for page in pages:
            self._resident.remove(page, Where.HOST)
        self._mover.send_out(pages)

    # --- budget, statistics, end --------------------------------------------------------------------------------------

    @property
    def budget(self) -> int | None:
        """Bytes of the device tier; assign a number, a size or None while running: a sweep in another thread is waited for.
        Raises MemoryBudgetError."""
        return self._resident.budget

    @budget.setter
    def budget(self, value: int | str | None) -> None:
        wanted = None if value is None else parse_bytes(value)
        check_budget(wanted, self.page_bytes)
        with self.steady, whole, self._lock:
            self._reap()
            before, self._resident.budget = self._resident.budget, wanted
            try:
                self._shrink()
            except MemoryBudgetError:
                self._resident.budget = before
                raise
            self._mover.background |= wanted is not None
            self._trace("budget", None, wanted or 0)

    def _shrink(self) -> None:
        """Send out what is above the budget and nobody holds; what is held leaves when it is released."""
        self._send_out(self._resident.victims(self._resident.excess())[0])
        self._mover.drop_spare()

    @property
    def has_file(self) -> bool:
        """Whether pages may lie in a file."""
        return self._mover.has_file

    def wait(self) -> None:
        """Until all queued copies are done."""
        self._mover.copier.wait()

    def statistics(self) -> PoolStatistics:
        """A copy of the counts as of now."""
        with self._lock:
            self._reap()
            gradients = sum(p.size for p in self._resident if isinstance(p.share, tuple) and p.share[0] == GRADIENTS)
            return replace(
                self._counts,
                budget_bytes=self.budget,
                pages=len(self._table.pages),
                resident_pages=len(self._resident),
                gradient_bytes=gradients,
                paged_pages=sum(page.where is Where.HOST for page in self._table.pages.values()),
                host_bytes=self._mover.used_bytes("ram"),
                file_bytes=self._mover.used_bytes("file"),
            )

    def close(self) -> None:
        """Wait for the copies, and give the host tiers back; the pool cannot be used after."""
        self._mover.close()
        with self._lock:
            self._table.clear()
            self._resident.clear()


def _doom(pool: weakref.ref[PagePool], allocation: weakref.ref[Allocation]) -> None:
    """The owner is gone. Called by the garbage collector, at any time: nothing is done here that takes a lock."""
    there, lost = pool(), allocation()
    if there is not None and lost is not None:
        there._doomed.append(lost)
