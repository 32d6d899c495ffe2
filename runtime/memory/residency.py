"""What is on the device: by the decisions so far, which the queued copies carry out in the same order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from ...errors import MemoryBudgetError
from .budget import format_bytes
from .page import Page, Where


class Residency:
    """The pages whose `where` is DEVICE, the one used longest ago first, and their `bytes`; `budget` bounds these (None:
    nothing does). Whoever calls holds a lock."""

    def __init__(self, budget: int | None) -> None:
        self.budget, self.bytes = budget, 0
        self._pages: OrderedDict[Page, None] = OrderedDict()

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages)

    def __contains__(self, page: Page) -> bool:
        return page in self._pages

    def __len__(self) -> int:
        return len(self._pages)

    def add(self, pages: Iterable[Page]) -> None:
        """They come."""
        for page in pages:
            page.where = Where.DEVICE
            self._pages[page] = None
            self.bytes += page.size

    def remove(self, page: Page, to: Where) -> None:
        """It goes."""
        page.where = to
        del self._pages[page]
        self.bytes -= page.size

    def touch(self, page: Page) -> None:
        """It is the one used last."""
        self._pages.move_to_end(page)

    def unheld_bytes(self) -> int | None:
        """What of the budget is not taken by pages that somebody uses; None without a budget."""
        return None if self.budget is None else self.budget - sum(page.size for page in self._pages if page.pins)

    def excess(self, size: int = 0) -> int:
        """Bytes above the budget, 0 or less if there are none, once `size` more have come."""
        return 0 if self.budget is None else self.bytes + size - self.budget

    def victims_for(self, size: int) -> list[Page]:
        """The pages to send out so that `size` more bytes fit. Raises MemoryBudgetError where that cannot be."""
        if self.budget is None or size == 0:
            return []
        found, short = self.victims(self.excess(size))
        if short > 0:
            raise MemoryBudgetError(
                f"{format_bytes(size)} of pages do not fit the device budget of {format_bytes(self.budget)} beside "
                f"{format_bytes(self.bytes)} in use: give at least {format_bytes(self.budget + short)}."
            )
        return found

    def victims(self, excess: int) -> tuple[list[Page], int]:
        """The pages used longest ago that nobody holds, `excess` bytes of them; and how much is missing to that."""
        found = []
        for page in self._pages:
            if excess <= 0:
                break
            if page.pins == 0:
                found.append(page)
                excess -= page.size
        return found, max(0, excess)

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self.bytes = 0
