"""What the device did during one `optimizer.step()`: copies of each direction and kernels by time, and what they waited for.

    trace (torch.profiler's, for Chrome) -> spans -> timeline -> one sentence

A gap of a stream of copies is the host's where the next copy was queued after the gap began, else the copy waited for an
event: a page's memory, or the kernel. Used by gpu.py; arithmetic but for `traced`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_timing import synchronize

Found = dict[str, Any]
KINDS = {"to_device": "Memcpy HtoD", "to_host": "Memcpy DtoH", "kernel": "paged_step"}
WHOLE_PAGES = 0.5  # of the longest copy: tables, which are short, are none
NEAR = 0.85  # of the link's speed


class Span(NamedTuple):
    """us; `queued` None where the trace does not say."""

    name: str
    start: float
    end: float
    stream: int
    queued: float | None
    bytes: int


def traced(optimizer: torch.optim.Optimizer, step: Callable[[], object], device: str) -> Found:
    """The trace of what `step` does within `optimizer.step()`, which has the device to itself."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    profile = torch.profiler.profile(activities=[activity])

    def before(*_: Any) -> None:
        synchronize(device)
        profile.start()

    def after(*_: Any) -> None:
        synchronize(device)
        profile.stop()

    hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        found: Found = json.loads(file.read_text(encoding="utf-8"))
        return found


def spans(trace: Found) -> list[Span]:
    """Of the device, in order of time; times from the first thing that the host queued or the device did."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    correlation = lambda event: event.get("args", {}).get("correlation")
    queued = {correlation(e): e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    begin = min([*(e["ts"] for e in on_device), *queued.values()], default=0.0)
    found = []
    for event in on_device:
        arguments, start = event.get("args", {}), event["ts"] - begin
        at = queued.get(correlation(event))
        stream, size = arguments.get("stream", -1), arguments.get("bytes", 0)
        found.append(Span(event["name"], start, start + event["dur"], stream, None if at is None else at - begin, size))
    return sorted(found, key=lambda span: span.start)


def timeline(all_spans: Sequence[Span], most: int = 5) -> Found:
    """By kind: count, median us, us in which any of it runs, bytes a second, gaps; how both directions overlap."""
    found: Found = {"whole_us": max((span.end for span in all_spans), default=0.0)}
    unions: dict[str, list[tuple[float, float]]] = {}
    for kind, name in KINDS.items():
        mine = [span for span in all_spans if span.name.startswith(name)]
        if kind != "kernel":
            longest = max((span.end - span.start for span in mine), default=0.0)
            mine = [span for span in mine if span.end - span.start >= WHOLE_PAGES * longest]
        if mine:
            unions[kind] = union((span.start, span.end) for span in mine)
            found[kind] = _of_kind(mine, unions[kind], most)
    if {"to_device", "to_host"} <= unions.keys():
        found["both_us"] = overlap(unions["to_device"], unions["to_host"])
    return found


def _of_kind(mine: Sequence[Span], runs: Sequence[tuple[float, float]], most: int) -> Found:
    busy = length(runs)
    gaps = sorted(_gaps(mine, runs), reverse=True)
    found: Found = {
        "count": len(mine),
        "median_us": statistics.median(span.end - span.start for span in mine),
        "busy_us": busy,
        "first_us": runs[0][0],
        "last_us": runs[-1][1],
        "streams": sorted({span.stream for span in mine}),
        "host_late_us": sum(us for us, late in gaps if late),
        "waiting_us": sum(us for us, late in gaps if not late),
        "largest_gaps": [{"us": us, "host_late": late} for us, late in gaps[:most]],
    }
    size = sum(span.bytes for span in mine)
    return found | ({"bytes_per_s": 1e6 * size / busy} if size and busy else {})


def _gaps(mine: Sequence[Span], runs: Sequence[tuple[float, float]]) -> list[tuple[float, bool]]:
    """us between runs, and whether the host was late: what comes next was queued when the gap had begun."""
    first_at: dict[float, Span] = {}
    for span in mine:
        first_at.setdefault(span.start, span)
    found = []
    for (_, end), (start, _) in itertools.pairwise(runs):
        queued = first_at[start].queued
        found.append((start - end, queued is not None and queued > end))
    return found


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order, those that touch joined."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def length(runs: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in runs)


def overlap(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """Of two unions."""
    return length(first) + length(second) - length(union([*first, *second]))


def reading(found: Found, link: Found) -> str:
    """What the time went to, of link, host, waits and kernel, whichever took most of it."""
    ways = [way for way in ("to_device", "to_host") if way in found]
    if not ways:
        return "no copies of pages: nothing to read"
    way = max(ways, key=lambda one: found[one]["busy_us"])
    busiest, whole = found[way], found["whole_us"]
    parts = {
        "copies": busiest["busy_us"],
        "the host": busiest["host_late_us"],
        "waits for events": busiest["waiting_us"],
        "before and after": whole - (busiest["last_us"] - busiest["first_us"]),
        "kernels": found.get("kernel", {}).get("busy_us", 0.0),
    }
    largest = max(parts, key=parts.__getitem__)
    said = {
        "copies": _about_the_link(way, busiest, link),
        "the host": "the host queues too late",
        "waits for events": "copies wait though the host is ahead: for the other direction's buffers, or for the kernel",
        "before and after": f"the step begins or ends without copies {way}",
        "kernels": "the kernel is slow, not the link",
    }[largest]
    shares = ", ".join(f"{name} {us / 1e3:.2f}" for name, us in parts.items())
    both = f"; both directions at once {found['both_us'] / 1e3:.2f}" if "both_us" in found else ""
    return f"{said} (ms {way} of {whole / 1e3:.2f}: {shares}{both})"


def _about_the_link(way: str, busiest: Found, link: Found) -> str:
    """Copies fill the time: are they as fast as the link is by pieces, while the other direction is busy?"""
    speed = busiest.get("bytes_per_s")
    known = [link[name] for name in ("both_by_pieces", f"{way}_by_pieces") if name in link]
    if speed is None or not known:
        return "copies fill the time"
    said = f"copies fill the time at {speed / 1e9:.1f} GB/s, bare pieces at {known[0] / 1e9:.1f}"
    return (
        f"{said}: the link is the bound"
        if speed >= NEAR * known[0]
        else f"{said}: pages or pins are slow, not the link"
    )
