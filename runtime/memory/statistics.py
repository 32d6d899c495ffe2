"""What the pool counts, and the trace of what it did."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .page import Page

TRACED_EVENTS = 20_000


class PoolEvent(NamedTuple):
    """`ms` since the pool was made; `kind` is create, page_in, page_out, stall, free or budget; `page` -1: none."""

    ms: float
    kind: str
    page: int
    bytes: int


class Trace:
    """The last events, timed from its start."""

    def __init__(self) -> None:
        self.events: deque[PoolEvent] = deque(maxlen=TRACED_EVENTS)
        self._started = time.perf_counter()

    def __call__(self, kind: str, page: Page | None, size: int = 0) -> None:
        """`size` where there is no page."""
        ms = (time.perf_counter() - self._started) * 1e3
        self.events.append(PoolEvent(ms, kind, *((-1, size) if page is None else (page.number, page.size))))


@dataclass
class PoolStatistics:
    """Bytes, counts and ms. `device_bytes` are what the device tier holds now, spare buffers included.

    A *hit* is a page that was on the device, or on its way there, when it was needed; a *miss* had to be asked for
    then. A *stall* is a wait for a copy, of either kind. `gradient_bytes` are pages of gradients that are alive.
    """

    page_bytes: int = 0
    budget_bytes: int | None = None
    pages: int = 0
    resident_pages: int = 0
    paged_pages: int = 0
    device_bytes: int = 0
    peak_device_bytes: int = 0
    host_bytes: int = 0
    file_bytes: int = 0
    gradient_bytes: int = 0
    moved_in_bytes: int = 0
    moved_out_bytes: int = 0
    hits: int = 0
    misses: int = 0
    stalls: int = 0
    stall_ms: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)
