"""Moving pages between tiers, one after the other in the order asked for, beside the computation.

On the CPU a worker thread copies. On CUDA copies are queued (stream_copier.py): by the caller, and by a worker thread where
a page has to be read from a file first, or written to one.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .page import Page


class Copier:
    """Copies on the CPU: RAM as the device tier."""

    pinned = False
    only_queues = False  # copies from and to RAM are under way, not done, when `read` and `write` return

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> Future:
        """Run `job` after all earlier ones."""
        if self._worker is None:
            # by a weak reference: what a thread began with it keeps, and a copier ends its thread when it goes
            self._worker = ThreadPoolExecutor(1, "qlora-pages", initializer=_begin, initargs=(weakref.ref(self),))
        return self._worker.submit(job, *args)

    def begin_thread(self) -> None:
        """What the worker thread does first."""

    @property
    def started(self) -> bool:
        """Whether anything was ever submitted: until then nothing can be in flight."""
        return self._worker is not None

    def wait(self) -> None:
        """Until all submitted jobs are done."""
        if self._worker is not None:
            self._worker.submit(lambda: None).result()

    def empty(self, size: int) -> Tensor:
        """A new buffer of the device tier; not within `coming`."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def coming(self) -> AbstractContextManager[None]:
        """Around `zero` and `read` of pages that come together."""
        return contextlib.nullcontext()

    def leaving(self) -> AbstractContextManager[None]:
        """Around `write` of pages that leave together."""
        return contextlib.nullcontext()

    def zero(self, page: Page) -> None:
        """Fill the page's buffer with zeros."""
        assert page.buffer is not None
        ctypes.memset(page.buffer.data_ptr(), 0, page.size)

    def read(self, page: Page, host: Tensor, in_file: bool) -> None:
        """Host -> device; `in_file`: `host` is mapped from a file, and not pinned."""
        assert page.buffer is not None
        ctypes.memmove(page.buffer.data_ptr(), host.data_ptr(), page.size)  # without a team of threads, or the GIL

    def write(self, page: Page, host: Tensor, in_file: bool) -> None:
        """Device -> host."""
        assert page.buffer is not None
        ctypes.memmove(host.data_ptr(), page.buffer.data_ptr(), page.size)

    def ready(self, pages: Sequence[Page]) -> None:
        """What is computed from here on sees the pages."""

    def used(self, pages: Sequence[Page]) -> None:
        """Copies of the pages, and what comes into their memory after them, wait for what was computed up to here."""

    def wait_for(self, used: Any) -> None:
        """What comes to the device from here on waits for this event, `used` of a buffer's last page; None: for nothing."""

    def close(self) -> None:
        """Wait for everything and end the thread."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None


def _begin(copier: weakref.ref[Copier]) -> None:
    there = copier()
    if there is not None:
        there.begin_thread()
