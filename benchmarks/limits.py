"""A measured number beside the limit that it should keep: {what, measured, limit, met, bound}, and its line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Found = dict[str, Any]


def entry(
    what: str, measured: float, bound: str = "", *, at_least: float | None = None, at_most: float | None = None
) -> Found:
    """`bound` says what keeps it from being better; without a limit it stands for itself."""
    limit, met = None, None
    if at_least is not None:
        limit, met = f"at least {at_least:.3g}", measured >= at_least
    elif at_most is not None:
        limit, met = f"at most {at_most:.3g}", measured <= at_most
    return {"what": what, "measured": measured, "limit": limit, "met": met, "bound": bound}


def line(one: Found) -> str:
    met = {None: "", True: ": met", False: ": NOT MET"}[one["met"]]
    limit = f" (limit: {one['limit']}{met})" if one["limit"] else ""
    return f"{one['what']}: {one['measured']:.4g}{limit}" + (f"; {one['bound']}" if one["bound"] else "")


def show_limits(entries: Iterable[Found]) -> None:
    for one in entries:
        print(f"  {line(one)}")
