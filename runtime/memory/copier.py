"""Moving pages between tiers, one after the other in the order asked for, beside the computation.

A worker thread does it. On the CPU it copies; on CUDA it queues copies on a stream of its own, ordered against the
computation by events, and goes through two pinned buffers where the host memory is not pinned (a mapped file).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .page import Page


class Copier:
    """Copies on the CPU: RAM as the device tier."""

    pinned = False

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None

    def submit(self, job: Callable[..., None], *args: Any) -> Future:
        """Run `job` after all earlier ones."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qlora-pages")
        return self._worker.submit(job, *args)

    @property
    def started(self) -> bool:
        """Whether anything was ever submitted: until then nothing can be in flight."""
        return self._worker is not None

    def wait(self) -> None:
        """Until all submitted jobs are done."""
        if self._worker is not None:
            self._worker.submit(lambda: None).result()

    def empty(self, size: int) -> Tensor:
        """A new buffer of the device tier."""
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def zero(self, page: Page) -> None:
        """Fill the page's buffer with zeros."""
        assert page.buffer is not None
        ctypes.memset(page.buffer.data_ptr(), 0, page.size)

    def read(self, page: Page, host: Tensor) -> None:
        """Host -> device."""
        assert page.buffer is not None
        ctypes.memmove(page.buffer.data_ptr(), host.data_ptr(), page.size)  # without a team of threads, or the GIL

    def write(self, page: Page, host: Tensor) -> None:
        """Device -> host."""
        assert page.buffer is not None
        ctypes.memmove(host.data_ptr(), page.buffer.data_ptr(), page.size)

    def ready(self, page: Page) -> None:
        """What is computed from here on sees the page."""

    def used(self, page: Page) -> None:
        """A copy of the page waits for what was computed up to here."""

    def close(self) -> None:
        """Wait for everything and end the thread."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None


class StreamCopier(Copier):
    """Copies on a CUDA stream of their own."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._staging: list[Tensor] = []
        self._staged = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0

    def empty(self, size: int) -> Tensor:
        with torch.cuda.stream(self.stream):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def zero(self, page: Page) -> None:
        assert page.buffer is not None
        with torch.cuda.stream(self.stream):
            page.buffer.zero_()
            page.arrived = self.stream.record_event()

    def read(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        with torch.cuda.stream(self.stream):
            if host.is_pinned():
                page.buffer.copy_(host, non_blocking=True)
            else:
                staging, staged = self._stage(page.size)
                staging.copy_(host)
                page.buffer.copy_(staging, non_blocking=True)
                staged.record(self.stream)
            page.arrived = self.stream.record_event()

    def write(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        with torch.cuda.stream(self.stream):
            if page.used is not None:
                self.stream.wait_event(page.used)
            if host.is_pinned():
                host.copy_(page.buffer, non_blocking=True)
                return
            staging, staged = self._stage(page.size)
            staging.copy_(page.buffer, non_blocking=True)
            staged.record(self.stream)
            staged.synchronize()
            host.copy_(staging)

    def _stage(self, size: int) -> tuple[Tensor, Any]:
        """The pinned buffer whose last copy is the older one, free to be written."""
        if not self._staging:
            self._staging = [torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu") for _ in range(2)]
        self._turn ^= 1
        self._staged[self._turn].synchronize()
        return self._staging[self._turn], self._staged[self._turn]

    def ready(self, page: Page) -> None:
        assert page.buffer is not None
        current = torch.cuda.current_stream(self.device)
        if page.arrived is not None:
            current.wait_event(page.arrived)
        page.buffer.record_stream(current)

    def used(self, page: Page) -> None:
        page.used = torch.cuda.current_stream(self.device).record_event()


def make_copier(device: torch.device) -> Copier:
    """By device: CUDA streams, or a thread that copies."""
    return StreamCopier(device) if device.type == "cuda" else Copier()
