"""Copies on two CUDA streams of their own, one for each direction of the bus, ordered by events; the device never waits.

    page comes     stream in: waits until the buffer's last page has left and the slot is written; copies; records `arrived`
                   computation: waits for `arrived` before it uses the page
    page leaves    computation: records `used` when it is done
                   stream out: waits for `used`, or `arrived` if nobody used it; copies; records `left`

    new buffer     of the computation's stream, so that what pages leave is there for activations. The stream in waits for
                   what was queued there before, which may still use that memory; the allocator waits for both streams
                   of copies before it gives the memory to anybody else (`record_stream`)

Pages that come or leave together share the event; each costs the host some microseconds, as does every change of stream.
Host memory that is not pinned (a mapped file's) is reached through two pinned buffers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
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
        # by a buffer's address: the streams whose use of it the allocator knows of; begun anew where a new one lies there
        self._known: dict[int, set[Any]] = {}

    def begin_thread(self) -> None:
        """Makes the device the thread's: else each change of stream would switch it, and the first one wake another GPU."""
        torch.cuda.set_device(self._in.device)

    def inward(self) -> AbstractContextManager[Any]:
        """Around `copy_in` and `zero`."""
        return torch.cuda.stream(self._in)

    def outward(self) -> AbstractContextManager[Any]:
        """Around `copy_out`."""
        return torch.cuda.stream(self._out)

    def carried(self, job: Callable[..., None]) -> Callable[..., None]:
        """The job, for another thread, on the stream where the caller computes."""
        current = torch.cuda.current_stream(self._device)

        def on_it(*args: Any) -> None:
            with torch.cuda.stream(current):
                job(*args)

        return on_it

    def empty(self, size: int) -> Tensor:
        """Memory for a page, of the stream where the caller computes; what that has queued so far may still use it."""
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        buffer.record_stream(self._in)
        buffer.record_stream(self._out)
        self._known[buffer.data_ptr()] = {torch.cuda.current_stream(self._device)}
        return buffer

    def pinned(self, size: int) -> Tensor:
        """Pinned host memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True, device="cpu")

    def copy_in(self, buffer: Tensor, pinned: Tensor) -> None:
        """Queue a copy to the device."""
        buffer.copy_(pinned, non_blocking=True)

    def copy_out(self, pinned: Tensor, buffer: Tensor) -> None:
        """Queue a copy to the host."""
        pinned.copy_(buffer, non_blocking=True)

    def zero(self, buffer: Tensor) -> None:
        """Queue zeros, on the stream in."""
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

    def computation_waits(self, events: Sequence[Any], buffers: Sequence[Tensor]) -> None:
        """What the caller queues from here on begins after the events, and may use the buffers."""
        current = torch.cuda.current_stream(self._device)
        for event in events:
            current.wait_event(event)
        for buffer in buffers:
            known = self._known[buffer.data_ptr()]
            if current not in known:
                buffer.record_stream(current)
                known.add(current)


class StreamCopier(Copier):
    """See above. `streams` stands for the device: a test has its own."""

    pinned = only_queues = True

    def __init__(self, streams: CudaStreams) -> None:
        super().__init__()
        self._streams = streams
        self._together: list[Page] = []  # that come, or leave, and get the event of all
        self._awaited: dict[int, Any] = {}  # events that their stream waits for already, by id
        self._staging: list[tuple[Tensor, Any]] = []  # pinned buffers, the one used longest ago first; its last copy
        self._new = False  # since pages came last there are buffers that were something else before

    def submit(self, job: Callable[..., None], *args: Any) -> Future:
        return super().submit(self._streams.carried(job), *args)

    def begin_thread(self) -> None:
        self._streams.begin_thread()

    def empty(self, size: int) -> Tensor:
        buffer, self._new = self._streams.empty(size), True
        return buffer

    def wait(self) -> None:
        super().wait()
        for event in (self._streams.came(), self._streams.left()):
            event.synchronize()

    @contextmanager
    def coming(self) -> Iterator[None]:
        if self._new:
            self._streams.in_waits(self._streams.computed())
            self._new = False
        try:
            with self._streams.inward():
                yield
        finally:
            pages, came = self._all_together(), self._streams.came()
            for page in pages:
                page.arrived = came

    @contextmanager
    def leaving(self) -> Iterator[None]:
        try:
            with self._streams.outward():
                yield
        finally:
            pages, left = self._all_together(), self._streams.left()
            for page in pages:
                page.left = page.used = left

    def _all_together(self) -> list[Page]:
        found, self._together = self._together, []
        self._awaited.clear()
        return found

    def zero(self, page: Page) -> None:
        assert page.buffer is not None
        self._streams.zero(page.buffer)
        self._together.append(page)

    def read(self, page: Page, host: Tensor, in_file: bool) -> None:
        assert page.buffer is not None
        self.wait_for(page.left)
        if not in_file:
            self._streams.copy_in(page.buffer, host)
        else:
            staging = self._free_staging(page.size)
            ctypes.memmove(staging.data_ptr(), host.data_ptr(), page.size)
            self._streams.copy_in(page.buffer, staging)
            self._staging.append((staging, self._streams.came()))
        self._together.append(page)

    def write(self, page: Page, host: Tensor, in_file: bool) -> None:
        assert page.buffer is not None
        event = page.arrived if page.used is None else page.used  # who used it had waited until it was there
        if event is not None and id(event) not in self._awaited:
            self._streams.out_waits(event)
            self._awaited[id(event)] = event
        if not in_file:
            self._streams.copy_out(host, page.buffer)
            self._together.append(page)
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

    def ready(self, pages: Sequence[Page]) -> None:
        events = {id(page.arrived): page.arrived for page in pages}
        self._streams.computation_waits([*events.values()], [page.buffer for page in pages if page.buffer is not None])

    def used(self, pages: Sequence[Page]) -> None:
        event = self._streams.computed()
        for page in pages:
            page.used = event

    def wait_for(self, used: Any) -> None:
        if used is not None and id(used) not in self._awaited:
            self._streams.in_waits(used)
            self._awaited[id(used)] = used


def make_copier(device: torch.device) -> Copier:
    """By device: CUDA streams, or a thread that copies."""
    return StreamCopier(CudaStreams(device)) if device.type == "cuda" else Copier()
