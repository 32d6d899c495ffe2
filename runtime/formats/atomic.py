"""Writes that leave the old file or the new one, never half: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from safetensors import SafetensorError

from ...errors import OutputError
from .temporary import temporary_folder


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """OSError while writing `path`, or a file of it under a temporary name -> OutputError with one sentence.

    So too safetensors' own error, where the system refused it something.
    """
    try:
        yield
    except OSError as error:
        raise _named(path, error) from error
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise _named(path, OSError(int(found[1]), os.strerror(int(found[1])))) from error
    except OutputError as error:
        if isinstance(error.__cause__, OSError):
            raise _named(path, error.__cause__) from error.__cause__
        raise


def _named(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full: {path} was not written; free some space and try again.")
    return OutputError(f"{path} cannot be written ({error.strerror or error}); choose another output.")


def write_file(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path`, making its folder. Raises OutputError (not writable, disk full)."""
    path = Path(path)
    write_files(path.parent, {path.name: data}, path)
    return path


def write_files(folder: Path, contents: Mapping[str, bytes | str], name: Path | None = None) -> None:
    """Write files by name, each as `write_file`; if one cannot be written, all are as they were. `name` is for errors."""
    temporaries: dict[str, str] = {}
    with output_errors(name or folder), made_folder(folder):
        try:
            for file_name, data in contents.items():
                handle, temporary = tempfile.mkstemp(prefix=f".{file_name}.", suffix=".tmp", dir=folder)
                temporaries[temporary] = file_name
                with os.fdopen(handle, "wb") as file:
                    file.write(data.encode() if isinstance(data, str) else data)
                    sync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's own mode is private to the user
            for temporary, file_name in temporaries.items():
                os.replace(temporary, folder / file_name)
        except BaseException:
            for temporary in temporaries:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            raise
        _sync_folder(folder)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path` that becomes `path` when the block ends without an error.

    After an error (or Ctrl-C) the temporary folder is removed and `path` is as it was. What a killed process leaves is
    a hidden folder `.NAME.*.tmp` beside `path`, never a half-written `path`; the next one of `path` removes it. Without
    `durable`, what is new may still be in the system's cache when the block has ended (a power failure in the next
    seconds leaves files cut short, which their readers refuse); what it replaces is removed only after it is on the disk.
    A link stays one: the folder that it leads to is written. Without `overwrite`, what came to lie at `path` during the
    block stays there, and the new folder beside it.
    Raises OutputError where `path` exists and is not an empty folder (with `overwrite`: is not a folder), where it
    cannot be written, or where the disk is full.
    """
    path = Path(os.path.realpath(path))
    check_output_folder(path, overwrite=overwrite)
    with output_errors(path), made_folder(path.parent), temporary_folder(path) as temporary:
        yield temporary
        install_folder(temporary, path, overwrite=overwrite, durable=durable)


@contextmanager
def new_file(path: str | os.PathLike[str], *, overwrite: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a path of the same name, in a temporary folder beside `path`, that becomes `path` when the block ends well.

    As `new_folder`, for one large file that is written as a stream. Raises OutputError.
    """
    path = Path(os.path.realpath(path))
    check_output_file(path, overwrite=overwrite)
    with output_errors(path), made_folder(path.parent), temporary_folder(path) as temporary:
        yield temporary / path.name
        install_file(temporary / path.name, path, overwrite=overwrite, durable=durable)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and those above it; those that were made are gone again after an error, if nothing is in them."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for place in missing:
                place.rmdir()
        raise


def install_file(temporary: Path, path: Path, *, overwrite: bool, durable: bool = True) -> None:
    """A finished file -> `path`, `durable` or in the place of another: on the disk before it has that name.

    Raises OSError, and OutputError where there is one meanwhile and no `overwrite`: then the new one lies beside it.
    """
    durable = durable or path.exists()
    if durable:
        _sync_path(temporary)
    if overwrite:
        os.replace(temporary, path)
    else:
        try:
            _name_new_file(temporary, path)
        except FileExistsError:
            handle, beside = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=path.suffix, dir=path.parent)
            os.close(handle)
            raise _kept_beside(temporary, path, beside) from None
    if durable:
        _sync_folder(path.parent)


def install_folder(temporary: Path, path: Path, *, overwrite: bool, durable: bool = True) -> None:
    """A finished folder -> `path`, as `install_file`. Raises OSError, OutputError."""
    durable = durable or path.exists()
    os.chmod(temporary, 0o777 & ~_umask())
    if durable:
        _sync_tree(temporary)
    if overwrite:
        _replace_folder(temporary, path)
    else:
        try:
            os.replace(temporary, path)  # onto nothing, or an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _kept_beside(temporary, path, tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent)) from None
    if durable:
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


def check_output_name(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where the path is not UTF-8: safetensors reads no file there."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise OutputError(f"The output {path} has a name that is not UTF-8; choose another one.") from None


class BackgroundWriter:
    """Writes to a file in a thread of its own, one piece at a time.

    `write` waits for the piece before, so two are in memory: the one that is written and the one that is made. Errors
    of the thread (OSError) come out of the next `write`, or at the end of the block.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._thread = ThreadPoolExecutor(1, "writer")
        self._pending: Future[int] | None = None

    def write(self, data: memoryview) -> None:
        self.wait()
        self._pending = self._thread.submit(self.file.write, data)

    def wait(self) -> None:
        """Until all that was given is with the system. Raises OSError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()


def sync(descriptor: int) -> None:
    """fsync, except on the file systems that have none (some network and FUSE mounts answer EINVAL or ENOTSUP)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _name_new_file(temporary: Path, path: Path) -> None:
    """Rename without replacing anything. Raises FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _kept_beside(temporary: Path, path: Path, beside: str) -> OutputError:
    """A finished result whose place was taken -> `beside`, and what to say about it."""
    os.replace(temporary, beside)
    return OutputError(
        f"{path} was written by something else meanwhile and is left as it is; the result lies in {beside}."
    )


def _replace_folder(temporary: Path, path: Path) -> None:
    """`temporary` -> `path`. A folder that is already there is moved away first: rename() wants an empty target."""
    if not path.is_dir() or not any(path.iterdir()):
        os.replace(temporary, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:  # a signal's, too, which comes right after the first
        if not os.path.lexists(path):
            os.replace(old, path)
        raise
    finally:
        if os.path.lexists(path):  # or `old` is all there is
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
