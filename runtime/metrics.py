"""The records of a run: `metrics.jsonl`, one JSON object a line, and `run.json`, what was run and what came out."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .. import __version__
from ..errors import CheckpointError, OutputError
from .formats.atomic import output_errors, write_file


class MetricsLog:
    """Appends to a JSONL file. Lines of steps after `last_step` (those a resumed run does again) are dropped first, and
    those of the event `without`, which no longer hold."""

    def __init__(self, path: Path, last_step: int = 0, without: str = "") -> None:
        self.path = path
        if path.exists():
            kept = read_metrics(path) if last_step else []
            kept = [line for line in kept if line["step"] <= last_step and line.get("event") != without]
            write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        with output_errors(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line, handed to the system at once: a killed process loses none of it."""
        with output_errors(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # Closing writes again what could not be written: where that is known already, it is not said twice.
        with contextlib.suppress(*([] if kind is None else [OutputError])), output_errors(self.path):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log; a last line that a killed run left half-written is left out.

    Raises CheckpointError where another line is not one of ours.
    """
    try:
        # Only what a newline ends is whole.
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The metrics log {path} cannot be read: {error}.") from error
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
        raise CheckpointError(f"The metrics log {path} holds lines that are not this program's.")
    return lines


def write_run(path: Path, content: dict[str, Any]) -> None:
    """Replace `run.json`. Raises OutputError."""
    write_file(path, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    found = {"qlora-compile": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("transformers", "tokenizers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def memory_bytes(device: torch.device) -> int:
    """Bytes in use: the largest allocation so far on CUDA, the resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PagingMeter:
    """What a paged optimizer moved since the last look; nothing for any other."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._statistics: Callable[[], Any] | None = getattr(optimizer, "statistics", None)
        self._last = (0, 0, 0.0)

    def __call__(self) -> dict[str, float]:
        """`paged_in_bytes`, `paged_out_bytes` and `stall_ms`."""
        if self._statistics is None:
            return {}
        found = self._statistics()
        total = (found.moved_in_bytes, found.moved_out_bytes, found.stall_ms)
        moved_in, moved_out, stall = (now - before for now, before in zip(total, self._last))
        self._last = total
        return {"paged_in_bytes": moved_in, "paged_out_bytes": moved_out, "stall_ms": round(stall, 3)}


class Clock:
    """Estimates the time left from all that passed since the first step ended, which compiles and would mislead."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def seconds_left(self, step: int) -> float | None:
        """Seconds until the last step ends, saving and evaluation included; None until there are two steps."""
        now = time.perf_counter()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, then = self._first
        return (self.total_steps - step) * (now - then) / (step - first_step)


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return value if value - value == 0 else None
