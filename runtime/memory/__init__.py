"""The page pool: fixed-size pages that move between a device tier and a host tier under a byte budget."""

from .budget import format_bytes, page_bytes_for, parse_bytes
from .page import Allocation, Page, Span
from .pool import PagePool
from .statistics import PoolEvent, PoolStatistics

__all__ = [
    "Allocation",
    "Page",
    "PagePool",
    "PoolEvent",
    "PoolStatistics",
    "Span",
    "format_bytes",
    "page_bytes_for",
    "parse_bytes",
]
