"""Copies on a CUDA stream of their own, ordered against the computation by events, never by waiting for the device.

    page comes     copy stream: copy, record `arrived`              computation: waits for it before it uses the page
    page leaves    computation: records `used` when it is done      copy stream: waits for it before the copy, and before
                                                                    anything else comes into the same memory

Host memory that is not pinned (a mapped file) is reached through two pinned buffers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .copier import Copier
from .page import Page


class CudaStreams:
    """What is asked of CUDA: one stream for copies beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def empty(self, size: int) -> Tensor:
        """Memory for a page, of the copy stream's."""
        with torch.cuda.stream(self._copies):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def pinned(self, size: int) -> Tensor:
        """Pinned host memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")

    def is_pinned(self, host: Tensor) -> bool:
        """Whether a copy from or to it returns at once."""
        return host.is_pinned()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; one of the two is pinned."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def zero(self, target: Tensor) -> None:
        """Queue zeros."""
        with torch.cuda.stream(self._copies):
            target.zero_()

    def copied(self) -> Any:
        """An event: all copies queued so far."""
        return self._copies.record_event()

    def computed(self) -> Any:
        """An event: all that was queued so far where the caller computes."""
        return torch.cuda.current_stream(self._device).record_event()

    def copies_wait(self, event: Any) -> None:
        """Copies queued from here on begin after the event."""
        self._copies.wait_event(event)

    def computation_waits(self, event: Any, buffer: Tensor) -> None:
        """What the caller queues from here on begins after the event, and may use the buffer."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        buffer.record_stream(current)


class StreamCopier(Copier):
    """See above. `streams` stands for the device: a test has its own."""

    pinned = True

    def __init__(self, streams: CudaStreams) -> None:
        super().__init__()
        self._streams = streams
        self._staging: list[tuple[Tensor, Any]] = []  # pinned buffers, the one used longest ago first; its last copy

    def empty(self, size: int) -> Tensor:
        return self._streams.empty(size)

    def zero(self, page: Page) -> None:
        assert page.buffer is not None
        self._streams.zero(page.buffer)
        page.arrived = self._streams.copied()

    def read(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        if self._streams.is_pinned(host):
            self._streams.copy(page.buffer, host)
        else:
            staging = self._free_staging(page.size)
            ctypes.memmove(staging.data_ptr(), host.data_ptr(), page.size)
            self._streams.copy(page.buffer, staging)
            self._staging.append((staging, self._streams.copied()))
        page.arrived = self._streams.copied()

    def write(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        self.wait_for(page.used)
        if self._streams.is_pinned(host):
            self._streams.copy(host, page.buffer)
            return
        staging = self._free_staging(page.size)
        self._streams.copy(staging, page.buffer)
        copied = self._streams.copied()
        copied.synchronize()
        ctypes.memmove(host.data_ptr(), staging.data_ptr(), page.size)
        self._staging.append((staging, copied))

    def _free_staging(self, size: int) -> Tensor:
        """One of two pinned buffers, once its last copy is done."""
        if not self._staging:
            self._staging = [(self._streams.pinned(size), None) for _ in range(2)]
        staging, copied = self._staging.pop(0)
        if copied is not None:
            copied.synchronize()
        return staging

    def ready(self, page: Page) -> None:
        assert page.buffer is not None and page.arrived is not None
        self._streams.computation_waits(page.arrived, page.buffer)

    def used(self, pages: Sequence[Page]) -> None:
        event = self._streams.computed()
        for page in pages:
            page.used = event

    def wait_for(self, used: Any) -> None:
        if used is not None:
            self._streams.copies_wait(used)


def make_copier(device: torch.device) -> Copier:
    """By device: CUDA streams, or a thread that copies."""
    return StreamCopier(CudaStreams(device)) if device.type == "cuda" else Copier()
