"""Temporary folders beside an output. Each is locked while it is written, so what a killed process left is told from it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT = r"\.[a-z0-9_]{8}\.(tmp|old)"  # after the output's hidden name; `.old`: what it replaced


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder `.NAME.*.tmp` beside `path`, gone at the end if it still has that name. Raises OSError.

    What killed processes left of the same output is removed first: all that no process has locked.
    """
    _remove_left(path)
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the lock on it: None where the file system, or Windows, has none."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            lock = lock_folder(folder)
        except (BlockingIOError, FileNotFoundError):  # another process takes it for one that was left
            continue
        except OSError:
            return folder, None
        if lock is None or folder.exists():
            return folder, lock
        os.close(lock)


def _remove_left(path: Path) -> None:
    name = re.compile(re.escape(f".{path.name}") + LEFT)
    with contextlib.suppress(OSError):
        for place in [place for place in path.parent.iterdir() if name.fullmatch(place.name)]:
            # Without an output, what it replaced is all there is.
            if place.is_dir() and not place.is_symlink() and (place.suffix == ".tmp" or path.exists()):
                with contextlib.suppress(OSError):
                    lock = lock_folder(place)
                    if lock is not None:
                        shutil.rmtree(place, ignore_errors=True)
                        os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """A descriptor of the folder, which holds its lock until it is closed; None where the file system, or Windows, has none.
    Raises BlockingIOError where another process has it, OSError where it cannot be opened."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # some network file systems have none
        os.close(descriptor)
        return None
    return descriptor
