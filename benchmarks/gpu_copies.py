"""Copies between pinned memory and the device: the link's speed by how memory is pinned, and the least that a paged
optimizer's step can take: its pages through its buffers, with its streams and events, by a bare loop. Used by gpu.py.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import median, timed_on_cuda
from torch import Tensor

LINK_BYTES, PIECE, EXTENT = 1 << 28, 1 << 22, 1 << 26
LAYOUTS = (
    "",  # one piece of memory
    "_by_pieces",  # each page pinned alone
    "_from_extents",  # several pages in one, as a pool's
)
PAGES, BUFFERS, TOGETHER = 97, 12, 3  # of the step that gpu_paging.py measures: its budget is an eighth of its states


def pinned(layout: str, pages: int, piece: int = PIECE) -> list[Tensor]:
    """Pages of the host's; as whole, all of them in one."""
    made = lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if layout == "":
        return [made(pages * piece)]
    if layout == "_by_pieces":
        return [made(piece) for _ in range(pages)]
    each = max(1, EXTENT // piece)
    return [part for first in range(0, pages, each) for part in made(min(each, pages - first) * piece).split(piece)]


def link_speeds(device: str, size: int = LINK_BYTES) -> dict[str, float]:
    """Bytes a second between pinned memory and the device: each way alone, each way while the other is busy ("both"), by
    LAYOUTS; empty where there is no such way."""
    if device != "cuda":
        return {}
    there, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    found = {}
    for layout in LAYOUTS:
        host, back = (pinned(layout, size // PIECE) for _ in range(2))
        aside = torch.cuda.Stream()
        inward = functools.partial(_all_copied, there.split(len(host[0])), host)
        outward = functools.partial(_all_copied, back, other.split(len(back[0])))
        both = functools.partial(_both, inward, outward, aside)
        for way, copy in (("to_device", inward), ("to_host", outward), ("both", both)):
            copy()
            found[f"{way}{layout}"] = size / median(functools.partial(timed_on_cuda, copy), 5, 1.0)
    return found


def _all_copied(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def _both(inward: Callable[[], None], outward: Callable[[], None], aside: Any) -> None:
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        outward()
    inward()
    torch.cuda.current_stream().wait_stream(aside)


def bare_loop(layout: str, priority: int = 0, piece: int = PIECE, rounds: int = 5) -> dict[str, float]:
    """Median ms of one pass over all pages, and of the host's time for it: TOGETHER come, are written, leave."""
    host = pinned(layout, PAGES, piece)
    buffers = [torch.empty(piece, dtype=torch.uint8, device="cuda") for _ in range(BUFFERS)]
    windows = [buffers[first : first + TOGETHER] for first in range(0, BUFFERS, TOGETHER)]
    coming, leaving = (torch.cuda.Stream(priority=priority) for _ in range(2))
    host_s, whole_s = list[float](), list[float]()
    for _ in range(rounds + 1):  # the first pass warms up
        torch.cuda.synchronize()
        begin = time.perf_counter()
        left: dict[int, Any] = {}
        for number, first in enumerate(range(0, PAGES, TOGETHER)):
            at, pages = number % len(windows), host[first : first + TOGETHER]
            left[at] = _window(windows[at][: len(pages)], pages, coming, leaving, left.get(at))
        host_s.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        whole_s.append(time.perf_counter() - begin)
    ms = 1e3 * statistics.median(whole_s[1:])
    return {"ms": ms, "host_ms": 1e3 * statistics.median(host_s[1:]), "bytes_per_s": 1e3 * PAGES * piece / ms}


def _window(buffers: list[Tensor], pages: list[Tensor], coming: Any, leaving: Any, left: Any) -> Any:
    """Pages come into buffers that others have left, and leave -> the event of that."""
    if left is not None:
        coming.wait_event(left)
    with torch.cuda.stream(coming):
        _all_copied(buffers, pages)
    current = torch.cuda.current_stream()
    current.wait_event(coming.record_event())
    torch._foreach_add_(buffers, 1)
    leaving.wait_event(current.record_event())
    with torch.cuda.stream(leaving):
        _all_copied(pages, buffers)
    return leaving.record_event()
