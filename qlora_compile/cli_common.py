"""What the commands share: reading lists and pairs from options, printing answers for people and for programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, OutputError
from .interruption import check, deferred

_PLAIN_NAME = re.compile(r"[\w.\-]+")


def modules_option(text: str) -> str | tuple[str, ...]:
    """`q_proj,v_proj` -> names or suffixes; `all-linear` -> itself; anything else -> a regular expression."""
    if text == "all-linear":
        return text
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    return parts if all(_PLAIN_NAME.fullmatch(part) for part in parts) else text


def pairs_option(option: str, texts: Iterable[str], number: Callable[[str], Any]) -> dict[str, Any]:
    """`["q_proj=8", "mlp=4"]` -> `{"q_proj": 8, "mlp": 4}`. Raises ConfigError naming the option."""
    pairs = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            pairs[name] = number(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"{option} takes NAME=NUMBER, got {text!r}.")
    return pairs


def adapter_weights(texts: list[str]) -> dict[str, float]:
    """`["a", "b=0.3"]` -> `{"a": 1.0, "b": 0.3}`; a folder whose name holds `=` is taken as it is if it exists."""
    weights: dict[str, float] = {}
    for text in texts:
        if "=" in text and not Path(text).exists():
            pair = pairs_option("--adapter", [text], float)
        else:
            pair = {text: 1.0}
        for name, weight in pair.items():
            if name in weights:
                raise ConfigError(f"--adapter names {name!r} twice.")
            weights[name] = weight
    return weights


def check_page(page: Path, out: Path) -> None:
    """Raise OutputError unless a file can be written at `page`, outside of what is written at `out`: before long work."""
    real, place = Path(os.path.realpath(page)), Path(os.path.realpath(out))
    if real == place or place in real.parents:
        raise OutputError(f"The page {page} would lie in the output {out}; choose a file beside it.")
    above = next(folder for folder in real.parents if folder.exists())
    if real.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"The page {page} cannot be written; choose another file.")


def import_torch() -> None:
    """Import torch, not interrupted within it: its C++ code imports numpy, and goes on without where that is interrupted."""
    with deferred():
        import torch  # noqa: F401


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function `(done_bytes, total_bytes)` that shows a bar on a terminal's standard error, else a line each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        tenths = 0

        def line(done_bytes: int, total_bytes: int) -> None:
            nonlocal tenths
            check()
            if done_bytes * 10 // max(1, total_bytes) > tenths:
                tenths = done_bytes * 10 // total_bytes
                unit, size = ("kB", 1e3) if total_bytes < 10e6 else ("MB", 1e6)
                done, total = done_bytes / size, total_bytes / size
                print(f"{what}: {done:,.0f} of {total:,.0f} {unit}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def update(done_bytes: int, total_bytes: int) -> None:
            check()
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield update


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal's standard error that this goes on, and since when; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns, quiet = (SpinnerColumn(), TextColumn(what), TimeElapsedColumn()), not console.is_terminal
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=quiet) as bar:
        bar.add_task(what, total=None)
        yield


def print_json(answer: Mapping[str, Any]) -> None:
    """One JSON object on standard output, keys sorted; paths and dtypes as text."""
    print(json.dumps(answer, indent=2, sort_keys=True, default=str))


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    """Aligned `name  value` lines on standard output; a value of None is left out."""
    shown = [(name, str(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name:<{width}}  {value}")
