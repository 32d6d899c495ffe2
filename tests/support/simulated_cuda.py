"""A CUDA device that is not there: what `CudaStreams` asks torch for, with streams that run as late, or as early, as events
allow, and an allocator with the rules of torch's: memory is of the stream that it was made on, and given to nobody else; one
that was freed waits for all streams that were recorded with it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Event:
    """Done once its stream has run all that was queued before."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, False

    def synchronize(self) -> None:
        with self.stream.cuda.lock:
            self.stream.cuda.run_until(self)


class Stream:
    """Work that runs in the order in which it was queued; an event among it is waited for."""

    device = torch.device("cpu")

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.cuda, self.work = cuda, deque[Any]()

    def record_event(self) -> Event:
        event = Event(self)
        self.cuda.queue(self, lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: Event) -> None:
        self.cuda.queue(self, event)


class Block:
    """A piece of the device's memory: whose it is, who else uses it, and, once it is free, what it waits for."""

    def __init__(self, size: int, stream: Stream) -> None:
        self.array, self.stream = np.full(size, 77, dtype=np.uint8), stream
        self.memory = torch.from_numpy(self.array)
        self.users, self.pending = set[Stream](), list[Event]()


class Buffer(Tensor):
    """Of the device: what is done with it is queued."""

    cuda: SimulatedCuda

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("copy_", "zero_"):
            return super().__torch_function__(func, types, args, kwargs or {})
        cuda = next(arg for arg in args if isinstance(arg, Buffer)).cuda
        # the work does not hold the buffer: it may be free before that is done
        memory = [cuda.blocks[arg.data_ptr()].memory if isinstance(arg, Buffer) else arg for arg in args]
        cuda.queue(cuda.current_stream(), lambda: getattr(memory[0], name)(*memory[1:]))
        return args[0]

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.cuda.recorded += 1
        self.cuda.blocks[self.data_ptr()].users.add(stream)


class SimulatedCuda:
    """`order` is asked for the name of the stream that may go on: "in", "out" or "computation". Threads but the first have
    another stream, as they have in torch."""

    def __init__(self, order: Callable[[], str]) -> None:
        self.order = order
        self.lock, self.threads = threading.RLock(), list[str]()
        self.streams = {"computation": Stream(self), "default": Stream(self)}
        self._here = threading.local()
        self._here.stream = self.streams["computation"]
        self.blocks, self.free, self.recorded = dict[int, Block](), list[Block](), 0
        names = iter(("in", "out"))
        cuda = SimpleNamespace(
            Stream=lambda device: self.streams.setdefault(next(names), Stream(self)),
            current_stream=self.current_stream,
            stream=self.on,
            set_device=lambda device: self.threads.append(threading.current_thread().name),
        )
        empty = lambda *args, **options: self.empty(*args, **options)  # which a test may replace
        self.torch = SimpleNamespace(
            cuda=cuda, empty=empty, uint8=torch.uint8, inference_mode=torch.inference_mode, Tensor=Tensor
        )

    def current_stream(self, device: Any = None) -> Stream:
        found: Stream = getattr(self._here, "stream", self.streams["default"])
        return found

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._here.stream = before

    # --- memory

    def empty(self, size: int, *, device: Any = None, pin_memory: bool = False, dtype: Any = None) -> Tensor:
        """Pinned memory of the host's, or memory of the current stream's."""
        if pin_memory:
            return torch.full((size,), 77, dtype=torch.uint8)
        stream = self.current_stream()
        with self.lock:
            able = [b for b in reversed(self.free) if b.stream is stream and len(b.array) == size]
            block = next((b for b in able if all(event.done for event in b.pending)), None)
            if block is None:
                block = Block(size, stream)
                self.blocks[block.memory.data_ptr()] = block
            else:
                self.free.remove(block)
        array = block.array[:]  # ends with the tensor and all of its views
        weakref.finalize(array, self._give_back, block)
        buffer = torch.from_numpy(array).as_subclass(Buffer)  # type: ignore[attr-defined]
        buffer.cuda = self
        return buffer

    def _give_back(self, block: Block) -> None:
        with self.lock:
            block.pending, block.users = [stream.record_event() for stream in block.users], set()
            self.free.append(block)

    def launch(self, buffer: Tensor, kernel: Callable[[Tensor], Any]) -> None:
        """On the current stream; it does not hold the buffer."""
        memory = self.blocks[buffer.data_ptr()].memory
        self.queue(self.current_stream(), lambda: kernel(memory))

    # --- how it runs

    def queue(self, stream: Stream, work: Any) -> None:
        with self.lock:
            stream.work.append(work)
            chosen = self.streams.get(self.order())
            while chosen is not None and chosen.work and self._go(chosen):
                pass

    def _go(self, stream: Stream) -> bool:
        if isinstance(stream.work[0], Event):
            if not stream.work[0].done:
                return False
            stream.work.popleft()
        else:
            stream.work.popleft()()
        return True

    def run_until(self, event: Event) -> None:
        while not event.done:
            if not self._go(event.stream):
                self.run_until(event.stream.work[0])

    def synchronize(self) -> None:
        """All that was queued where the caller computes."""
        self.current_stream().record_event().synchronize()
