"""Measurements of candidates on this machine, kept in the kernel cache: `tuned-<kind>-<hash>.json`.

The hash is over what a time depends on: processor, threads, torch. Processes share the file: each addition reads it again
under a lock, adds its lines and renames the result into place, so nothing is lost and no reader sees half a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import KernelError
from . import cpp_build, devices

SECONDS_PER_PROBLEM = 1.0  # no candidate is called again once a problem has taken so long


class Entry(NamedTuple):
    """One line of a table: a problem's sizes, `n` one for each linear of its group, and the microseconds that each candidate
    took."""

    op: str
    m: int
    n: tuple[int, ...]
    k: int
    dtype: str
    quantized: bool
    microseconds: dict[str, float]

    def text(self, names: Sequence[str]) -> str:
        times = sorted((us, name) for name, us in self.microseconds.items() if name in names)
        sizes = f"M={self.m} N={'+'.join(map(str, self.n))} K={self.k}"
        return f"{sizes}: " + ", ".join(f"{name} {us:,.0f} us" for us, name in times)


_unwritten: dict[str, list[Entry]] = {}  # by device


def read_entries(raw: Sequence[dict[str, Any]]) -> tuple[Entry, ...]:
    return tuple(Entry(**fields | {"n": tuple(fields["n"])}) for fields in raw)


def about(device: str) -> dict[str, Any]:
    """What a measured time depends on."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "kind": devices.kind(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@functools.cache
def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cache_file(device: str) -> Path:
    """Where this machine's measurements lie. Raises KernelError if the cache folder cannot be made."""
    facts = about(device)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return cpp_build.cache_dir() / f"tuned-{facts['kind']}-{digest}.json"


def measured(device: str) -> tuple[Entry, ...]:
    """What was measured on this machine; a file that cannot be read counts as none."""
    return (*_unwritten.get(device, ()), *_read(cache_file(device)))


def _read(path: Path) -> tuple[Entry, ...]:
    try:
        return read_entries(json.loads(path.read_text(encoding="utf-8"))["entries"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not ours: it is measured again
        return ()


def remember(entries: Sequence[Entry], device: str) -> None:
    """Adds lines to this machine's file; a line of the same problem is replaced. Where it cannot be written (an image with
    a complete cache is read-only), the process keeps them, with one warning."""
    path = cache_file(device)
    try:
        with _locked(path.with_suffix(".lock")):
            known = {entry[:6]: entry for entry in (*_read(path), *entries)}
            lines = [entry._asdict() for _, entry in sorted(known.items())]
            cpp_build.write_atomically(
                path, (json.dumps({"about": about(device), "entries": lines}, indent=1) + "\n").encode()
            )
    except KernelError as error:
        if device not in _unwritten:
            warnings.warn(f"What was measured holds for this process only: {error}", RuntimeWarning, stacklevel=2)
        _unwritten.setdefault(device, []).extend(entries)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock between processes, where the platform has one; else the last writer wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with cpp_build.writing_to(path.parent), path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_all(calls: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median microseconds of each call; they take turns, at most 7 rounds and about SECONDS_PER_PROBLEM in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(8):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms caches and builds kernels
                times[name].append(time.perf_counter() - start)
        if turn and time.perf_counter() - begin > SECONDS_PER_PROBLEM:
            break
    return {name: round(statistics.median(values) * 1e6, 1) for name, values in times.items()}
