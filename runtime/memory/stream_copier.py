"""Copies on two CUDA streams of their own, one for each direction of the bus, ordered by events; the device never waits.

    page comes     stream in: waits until the buffer's last page has left and the slot is written; copies; records `arrived`
                   computation: waits for `arrived` before it uses the page
    page leaves    computation: records `used` when it is done
                   stream out: waits for `arrived` and `used`; copies; records `left`

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
    """What is asked of CUDA: two streams for copies beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def empty(self, size: int) -> Tensor:
        """Memory for a page, of the stream in's."""
        with torch.cuda.stream(self._in):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def pinned(self, size: int) -> Tensor:
        """Pinned host memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")

    def is_pinned(self, host: Tensor) -> bool:
        """Whether a copy from or to it returns at once."""
        return host.is_pinned()

    def copy_in(self, buffer: Tensor, pinned: Tensor) -> None:
        """Queue a copy to the device."""
        with torch.cuda.stream(self._in):
            buffer.copy_(pinned, non_blocking=True)

    def copy_out(self, pinned: Tensor, buffer: Tensor) -> None:
        """Queue a copy to the host."""
        with torch.cuda.stream(self._out):
            pinned.copy_(buffer, non_blocking=True)
        buffer.record_stream(self._out)

    def zero(self, buffer: Tensor) -> None:
        """Queue zeros, on the stream in."""
        with torch.cuda.stream(self._in):
            buffer.zero_()

    def came(self) -> Any:
        """An event: all that was queued in so far."""
        return self._in.record_event()

    def left(self) -> Any:
        """An event: all that was queued out so far."""
        return self._out.record_event()

    def computed(self) -> Any:
        """An event: all that was queued so far where the caller computes."""
        return torch.cuda.current_stream(self._device).record_event()

    def in_waits(self, event: Any) -> None:
        """What is queued in from here on begins after the event."""
        self._in.wait_event(event)

    def out_waits(self, event: Any) -> None:
        """What is queued out from here on begins after the event."""
        self._out.wait_event(event)

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
        page.arrived = self._streams.came()

    def read(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        if page.left is not None:
            self._streams.in_waits(page.left)
        if self._streams.is_pinned(host):
            self._streams.copy_in(page.buffer, host)
        else:
            staging = self._free_staging(page.size)
            ctypes.memmove(staging.data_ptr(), host.data_ptr(), page.size)
            self._streams.copy_in(page.buffer, staging)
            self._staging.append((staging, self._streams.came()))
        page.arrived = self._streams.came()

    def write(self, page: Page, host: Tensor) -> None:
        assert page.buffer is not None
        for event in (page.arrived, page.used):  # it may leave without having been used
            if event is not None:
                self._streams.out_waits(event)
        if self._streams.is_pinned(host):
            self._streams.copy_out(host, page.buffer)
            page.left = page.used = self._streams.left()
            return
        staging = self._free_staging(page.size)
        self._streams.copy_out(staging, page.buffer)
        copied = self._streams.left()
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
            self._streams.in_waits(used)


def make_copier(device: torch.device) -> Copier:
    """By device: CUDA streams, or a thread that copies."""
    return StreamCopier(CudaStreams(device)) if device.type == "cuda" else Copier()
