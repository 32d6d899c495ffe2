"""Writes that leave the old file or the new one, never half: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import OutputError


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """OSError while writing `path` -> OutputError with one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"The disk is full: {path} was not written; free some space and run it again.") from error
        reason = error.strerror or str(error)
        raise OutputError(f"{path} cannot be written ({reason}); choose another output.") from error


def write_file(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path`, making its folder. Raises OutputError (not writable, disk full)."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                sync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own mode is private to the user
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    return path


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that becomes `path` when the block ends without an error.

    After an error (or Ctrl-C) the temporary folder is removed and `path` is as it was. What a killed process leaves is
    a hidden folder `.NAME.*.tmp` beside `path`, never a half-written `path`.
    Raises OutputError where `path` exists and is not an empty folder (with `overwrite`: is not a folder), where it
    cannot be written, or where the disk is full.
    """
    path = Path(os.path.abspath(path))
    check_output_folder(path, overwrite=overwrite)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with output_errors(path):
            yield temporary
            install_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path of the same name, in a temporary folder beside `path`, that becomes `path` when the block ends well.

    As `new_folder`, for one large file that is written as a stream. Raises OutputError.
    """
    path = Path(os.path.abspath(path))
    check_output_file(path, overwrite=overwrite)
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with output_errors(path):
            yield temporary / path.name
            _sync_path(temporary / path.name)
            os.replace(temporary / path.name, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def install_folder(temporary: Path, path: Path) -> None:
    """A finished folder -> `path`, on the disk before it has that name. Raises OSError."""
    os.chmod(temporary, 0o777 & ~_umask())
    _sync_tree(temporary)
    _replace_folder(temporary, path)
    _sync_folder(path.parent)


def check_output_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError unless a file may be written at `path`: nothing there, or a file and `overwrite`."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"The output {path} is a folder, not a file; choose another one.")
    if path.exists() and not overwrite:
        raise OutputError(f"The output {path} exists; choose another one or ask to overwrite it.")


def check_output_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise OutputError unless a folder may be written at `path`: nothing there, an empty folder, or `overwrite`."""
    path = Path(path)
    if path.is_dir():
        if not overwrite and any(path.iterdir()):
            raise OutputError(f"The output folder {path} is not empty; choose another one or ask to overwrite it.")
    elif path.exists() or path.is_symlink():
        raise OutputError(f"The output {path} exists and is not a folder; choose another one.")


def sync(descriptor: int) -> None:
    """fsync, except on the file systems that have none (some network and FUSE mounts answer EINVAL or ENOTSUP)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _replace_folder(temporary: Path, path: Path) -> None:
    """`temporary` -> `path`. A folder that is already there is moved away first: rename() wants an empty target."""
    if not path.is_dir() or not any(path.iterdir()):
        os.replace(temporary, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _sync_path(file)
    _sync_folder(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. Windows cannot open a folder, and needs no such call."""
    if os.name == "posix":
        _sync_path(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
