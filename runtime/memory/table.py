"""The table of pages: which allocation lies where. It knows nothing of tiers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from ...errors import MemoryBudgetError
from .budget import format_bytes
from .page import Allocation, Page, Span


class PageTable:
    """Pages of one size; those with a hole by `share`. `trace` is told of each new one. Whoever calls holds a lock."""

    def __init__(self, page_bytes: int, trace: Callable[[str, Page], None]) -> None:
        self.page_bytes, self._trace = page_bytes, trace
        self.pages: dict[int, Page] = {}
        self._allocations: set[Allocation] = set()
        self._open: dict[object, list[Page]] = {}  # by `share`: pages that may have a hole
        self._numbers = itertools.count()

    def allocate(self, items: int, item_bytes: int, share: object) -> Allocation:
        """Room for whole items. Raises MemoryBudgetError where one is larger than a page."""
        if item_bytes > self.page_bytes:
            raise MemoryBudgetError(
                f"Pages of {format_bytes(self.page_bytes)} are smaller than one item of {item_bytes} bytes: "
                f"give a budget of at least {format_bytes(8 * item_bytes)}."
            )
        allocation = Allocation(items, item_bytes, list(self._spans(items, item_bytes, share)))
        self._allocations.add(allocation)
        return allocation

    def _spans(self, items: int, item_bytes: int, share: object) -> Iterator[Span]:
        """Fill a hole that takes all that is left, else whole new pages."""
        first = 0
        while first < items:
            left = items - first
            size = left * item_bytes
            usable = self._open.setdefault(share, [])
            page = next((page for page in usable if page.largest_hole() >= size), None)
            if page is None:
                page = Page(next(self._numbers), self.page_bytes, share)
                self.pages[page.number] = page
                usable.append(page)
                self._trace("create", page)
            count = min(left, self.page_bytes // item_bytes)
            offset = page.take(count * item_bytes)
            assert offset is not None  # the hole was looked for, or the page is new
            if not page.holes:
                usable.remove(page)
            yield Span(page, offset, first, count)
            first += count

    def free(self, allocation: Allocation) -> list[Page]:
        """Take an allocation out -> the pages that are gone with it. Twice is the same as once."""
        gone = []
        self._allocations.discard(allocation)
        for span in allocation.spans:
            page = span.page
            if not page.holes:
                self._open.setdefault(page.share, []).append(page)
            page.give_back(span.offset, span.count * allocation.item_bytes)
            if page.spans == 0:
                self._remove(page)
                gone.append(page)
        allocation.spans = []
        return gone

    def _remove(self, page: Page) -> None:
        del self.pages[page.number]
        usable = self._open[page.share]
        usable.remove(page)
        if not usable:
            del self._open[page.share]

    def clear(self) -> None:
        """Forget everything."""
        self.pages.clear()
        self._allocations.clear()
        self._open.clear()
