"""Byte budgets: "24GiB" or a number -> bytes, and the page size that fits a budget."""

from __future__ import annotations

import re

from ...errors import MemoryBudgetError
from ...page_plan import MIN_PAGE_BYTES

MAX_PAGE_BYTES = 4 << 20  # large enough that a copy's start-up cost does not show, small enough to overlap
# Pages that a sweep wants at once: those it works on, those that come in and those that leave.
_PAGES_PER_BUDGET = 8

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
_BY_LOWER = {name.lower(): factor for name, factor in _UNITS.items()}


def parse_bytes(value: int | str) -> int:
    """A number of bytes, or a size such as "24GiB", "1.5 GB" or "65536" -> bytes. Raises MemoryBudgetError."""
    if isinstance(value, int) and not isinstance(value, bool):
        amount = value
    else:
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
        if match is None or match[2].lower() not in _BY_LOWER:
            raise MemoryBudgetError(
                f"A memory budget must be a number of bytes or a size such as '24GiB' or '512MB', got {value!r}."
            )
        amount = int(float(match[1]) * _BY_LOWER[match[2].lower()])
    if amount < MIN_PAGE_BYTES:
        raise MemoryBudgetError(
            f"A memory budget of {amount} bytes is too small: the least that works is one page of "
            f"{MIN_PAGE_BYTES} bytes."
        )
    return amount


def format_bytes(amount: int) -> str:
    """65536 -> "64 KiB": the largest binary unit that leaves at least 1."""
    value, unit = float(amount), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def page_bytes_for(budget: int | None) -> int:
    """The page size: 4 MiB, or less where the budget holds fewer than eight of those; a power of two, 4 KiB at least."""
    if budget is None:
        return MAX_PAGE_BYTES
    share = max(MIN_PAGE_BYTES, min(MAX_PAGE_BYTES, budget // _PAGES_PER_BUDGET))
    return 1 << (share.bit_length() - 1)


def check_page_bytes(value: int) -> int:
    """Raises MemoryBudgetError for what cannot be the size of a page."""
    if value < MIN_PAGE_BYTES or value & (value - 1):
        raise MemoryBudgetError(f"page_bytes must be a power of two of at least {MIN_PAGE_BYTES}, got {value!r}.")
    return value


def check_budget(budget: int | None, page_bytes: int) -> None:
    """Raises MemoryBudgetError for a budget that no page fits."""
    if budget is not None and budget < page_bytes:
        raise MemoryBudgetError(
            f"A device budget of {format_bytes(budget)} is smaller than one page: the least that works with pages "
            f"of this size is {format_bytes(page_bytes)}."
        )
