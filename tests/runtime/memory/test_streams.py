"""Copies beside the computation, on streams that run as late, or as early, as events allow: every wait is needed."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_compile.errors import MemoryBudgetError, ModelStateError
from qlora_compile.runtime.memory import Page, PagePool, mover
from qlora_compile.runtime.memory.stream_copier import StreamCopier

KIB = 1024


class Event:
    """Done once its stream has run all that was queued before."""

    def __init__(self, device: Device, stream: deque[Any]) -> None:
        self.device, self.stream, self.done = device, stream, False

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.run_until(self)


class Device:
    """Three streams of queued work, by the interface of `CudaStreams`. `order` is asked which of them may go on."""

    def __init__(self, order: Callable[[], str]) -> None:
        self.order = order
        self.lock, self.threads = threading.RLock(), list[str]()
        self.streams: dict[str, deque[Any]] = {name: deque() for name in ("in", "out", "computation")}

    # --- what the copier calls

    def begin_thread(self) -> None:
        self.threads.append(threading.current_thread().name)

    def inward(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    outward = inward

    def empty(self, size: int) -> Tensor:
        return torch.full((size,), 77, dtype=torch.uint8)

    pinned = empty

    def copy_in(self, buffer: Tensor, pinned: Tensor) -> None:
        self.queue("in", lambda: buffer.copy_(pinned))

    def copy_out(self, pinned: Tensor, buffer: Tensor) -> None:
        self.queue("out", lambda: pinned.copy_(buffer))

    def zero(self, buffer: Tensor) -> None:
        self.queue("in", buffer.zero_)

    def came(self) -> Event:
        return self.event("in")

    def left(self) -> Event:
        return self.event("out")

    def computed(self) -> Event:
        return self.event("computation")

    def in_waits(self, event: Event) -> None:
        self.queue("in", event)

    def out_waits(self, event: Event) -> None:
        self.queue("out", event)

    def computation_waits(self, events: Sequence[Event], buffers: Sequence[Tensor]) -> None:
        for event in events:
            self.queue("computation", event)

    # --- how it runs

    def event(self, stream: str) -> Event:
        event = Event(self, self.streams[stream])
        self.queue(stream, lambda: setattr(event, "done", True))
        return event

    def queue(self, stream: str, work: Any) -> None:
        with self.lock:
            self.streams[stream].append(work)
            chosen = self.streams.get(self.order())
            while chosen and self._go(chosen):
                pass

    def _go(self, stream: deque[Any]) -> bool:
        if isinstance(stream[0], Event):
            if not stream[0].done:
                return False
            stream.popleft()
        else:
            stream.popleft()()
        return True

    def run_until(self, event: Event) -> None:
        while not event.done:
            if not self._go(event.stream):
                self.run_until(event.stream[0])


ORDERS: dict[str, Callable[[], Callable[[], str]]] = {
    "in first": lambda: lambda: "in",
    "out first": lambda: lambda: "out",
    "computation first": lambda: lambda: "computation",
    "nothing until it must": lambda: lambda: "",
    "any": lambda: functools.partial(random.Random(5).choice, ["in", "out", "computation", ""]),
    "any but out": lambda: functools.partial(random.Random(6).choice, ["in", "computation", ""]),
}


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, host: dict[str, Any]) -> Device:
    made = Device(ORDERS[request.param]())

    class Copier(StreamCopier):
        pinned = False  # torch needs a GPU to pin memory

    monkeypatch.setattr(mover, "make_copier", lambda _: Copier(made))  # type: ignore[arg-type]
    return made


@pytest.fixture(params=["pinned", "file"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {} if request.param == "pinned" else {"folder": tmp_path}


class Owner:
    """Anything that can be referred to weakly."""


def launch(device: Device, page: Page, work: Callable[[Tensor], Any]) -> None:
    """As a kernel: the memory is what the page has when it is called."""
    buffer = page.buffer
    assert buffer is not None
    device.queue("computation", lambda: work(buffer))


@pytest.fixture
def pool(device: Device, host: dict[str, Any]) -> Iterator[PagePool]:
    made = PagePool(budget=12 * KIB, page_bytes=4 * KIB, **host)
    yield made
    made.close()


def test_copies_and_the_computation_wait_for_each_other(device: Device, pool: PagePool) -> None:
    order, owners = random.Random(3), [Owner() for _ in range(7)]
    pages = [pool.allocate(owner, 4 * KIB, 1).pages[0] for owner in owners]
    scratch = pool.allocate(owners[0], 4 * KIB, 1).pages[0]  # as gradients: written, read, void
    expected = [0] * len(pages)
    seen: list[Tensor] = []
    for _ in range(60):
        at = order.randrange(len(pages))
        pool.prefetch([pages[order.randrange(len(pages))]])
        with pool.on_device([pages[at], scratch]):
            launch(device, scratch, lambda buffer: buffer.add_(1))
            launch(device, scratch, lambda buffer: seen.append(buffer.clone()))
            launch(device, pages[at], lambda buffer: buffer.add_(1))
        expected[at] += 1
        with pool.on_device([pages[at]], writes=False):  # only read: leaves without a copy
            launch(device, pages[at], lambda buffer, n=expected[at]: seen.append(buffer - (n - 1)))
        pool.forget([scratch])
        if order.random() < 0.3:
            pool.evict(keep_spare=order.random() < 0.5)
    pool.wait()
    device.computed().synchronize()
    assert len(seen) == 120 and all(bool((one == 1).all()) for one in seen)
    assert pool.statistics().moved_in_bytes > 0


def test_a_page_that_comes_back_waits_until_it_has_left(device: Device, pool: PagePool) -> None:
    """Into a fresh buffer, which nothing has to leave."""
    owner, seen = Owner(), list[Tensor]()
    [page] = pool.allocate(owner, 4 * KIB, 1).pages
    for value in (5, 6, 7):
        with pool.on_device([page]):
            launch(device, page, lambda buffer, value=value: buffer.fill_(value))
        pool.evict()  # its memory is given back
        with pool.on_device([page], writes=False):
            launch(device, page, lambda buffer: seen.append(buffer.clone()))
        pool.evict()
    device.computed().synchronize()
    assert [one.unique().tolist() for one in seen] == [[5], [6], [7]]


def test_a_page_that_nothing_used_leaves_after_it_came(
    device: Device, pool: PagePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came beside one for which there was no memory; it is stored nowhere, so it is copied: zeros."""
    owner, seen = Owner(), list[Tensor]()
    page, other = pool.allocate(owner, 8 * KIB, 1).pages
    buffers = iter([device.empty(4 * KIB)])
    with monkeypatch.context() as patch, pytest.raises(MemoryBudgetError):
        patch.setattr(device, "empty", functools.partial(_next_or_refuse, buffers))
        pool.acquire([page, other])
    pool.evict()
    with pool.on_device([page], writes=False):
        launch(device, page, lambda buffer: seen.append(buffer.clone()))
    device.computed().synchronize()
    assert page.stored and not seen[0].any()


def _next_or_refuse(buffers: Iterator[Tensor], size: int) -> Tensor:
    for buffer in buffers:
        return buffer
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_only_files_take_a_thread_which_has_the_device(device: Device, pool: PagePool, host: dict[str, Any]) -> None:
    """Copies between memories are queued by whoever asks for them."""
    owner = Owner()
    pages = pool.allocate(owner, 20 * KIB, 1).pages
    for page in pages * 2:
        with pool.on_device([page]):
            launch(device, page, lambda buffer: buffer.add_(1))
    pool.wait()
    assert [name.split("_")[0] for name in device.threads] == (["qlora-pages"] if host else [])
    assert pool.statistics().moved_in_bytes > 0


def test_pages_that_move_together_share_an_event(device: Device, pool: PagePool, host: dict[str, Any]) -> None:
    owner = Owner()
    pages = pool.allocate(owner, 12 * KIB, 1).pages
    with pool.on_device(pages):
        pass
    pool.evict(keep_spare=True)
    pool.wait()
    assert host or len({id(page.left) for page in pages}) == 1
    assert host or all(page.left.done for page in pages)  # whatever the device does first
    assert pool.prefetch(pages, displace=False) == 3
    pool.wait()
    assert len({id(page.arrived) for page in pages}) == (3 if host else 1)
    before = len(device.streams["computation"])
    with standing_still(device), pool.on_device(pages, writes=False):
        assert len(device.streams["computation"]) - before == (3 if host else 1)


@contextlib.contextmanager
def standing_still(device: Device) -> Iterator[None]:
    """Nothing runs meanwhile."""
    order, device.order = device.order, lambda: ""
    yield
    device.order = order


def test_a_copy_that_fails_is_told(device: Device, pool: PagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    [page] = pool.allocate(owner, 100, 1).pages
    with pool.on_device([page]):
        pass

    def fail(*_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(device, "copy_out", fail)
    pool.evict()
    with pytest.raises(ModelStateError, match=r"lost on its way to the host \(device lost\)"):
        pool.acquire([page])
