"""Copies beside the computation, on streams that run as late, or as early, as events allow: every wait is needed."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import SimulatedCuda
from torch import Tensor

from qlora_compile.errors import MemoryBudgetError, ModelStateError
from qlora_compile.runtime.memory import Page, PagePool, mover, stream_copier
from qlora_compile.runtime.memory.page import Where
from qlora_compile.runtime.memory.stream_copier import CudaStreams, StreamCopier

KIB = 1024


ORDERS: dict[str, Callable[[], Callable[[], str]]] = {
    "in first": lambda: lambda: "in",
    "out first": lambda: lambda: "out",
    "computation first": lambda: lambda: "computation",
    "nothing until it must": lambda: lambda: "",
    "any": lambda: functools.partial(random.Random(5).choice, ["in", "out", "computation", ""]),
    "any but out": lambda: functools.partial(random.Random(6).choice, ["in", "computation", ""]),
    "any but in": lambda: functools.partial(random.Random(7).choice, ["out", "computation", ""]),
}


@pytest.fixture(params=ORDERS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, host: dict[str, Any]) -> SimulatedCuda:
    made = SimulatedCuda(ORDERS[request.param]())

    class Copier(StreamCopier):
        pinned = False  # torch needs a GPU to pin memory

    monkeypatch.setattr(stream_copier, "torch", made.torch)
    monkeypatch.setattr(mover, "make_copier", lambda device: Copier(CudaStreams(device)))
    return made


@pytest.fixture(params=["pinned", "file"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return {} if request.param == "pinned" else {"folder": tmp_path}


class Owner:
    """Anything that can be referred to weakly."""


def launch(device: SimulatedCuda, page: Page, work: Callable[[Tensor], Any]) -> None:
    """As a kernel: the memory is what the page has when it is called."""
    assert page.buffer is not None
    device.launch(page.buffer, work)


@pytest.fixture
def pool(device: SimulatedCuda, host: dict[str, Any]) -> Iterator[PagePool]:
    made = PagePool(budget=12 * KIB, page_bytes=4 * KIB, **host)
    yield made
    made.close()


def test_copies_and_the_computation_wait_for_each_other(device: SimulatedCuda, pool: PagePool) -> None:
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
    device.synchronize()
    assert len(seen) == 120 and all(bool((one == 1).all()) for one in seen)
    assert pool.statistics().moved_in_bytes > 0


def test_a_page_that_comes_back_waits_until_it_has_left(device: SimulatedCuda, pool: PagePool) -> None:
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
    device.synchronize()
    assert [one.unique().tolist() for one in seen] == [[5], [6], [7]]


def test_pages_and_activations_take_turns_in_the_same_memory(device: SimulatedCuda, pool: PagePool) -> None:
    """What pages leave is there for the computation, and the other way round, and each waits for the other's last use."""
    order, owner = random.Random(4), Owner()
    pages = pool.allocate(owner, 12 * KIB, 1).pages
    expected, seen = [0] * len(pages), list[Tensor]()
    scratch = device.empty(4 * KIB)
    for turn in range(100):
        for _ in range(order.randrange(20)):  # so that some streams go on, and others do not
            device.launch(scratch, lambda memory: memory.add_(1))
        activations = [device.empty(4 * KIB) for _ in range(3)]
        for activation in activations:
            device.launch(activation, lambda memory, turn=turn: memory.fill_(turn))
        check = lambda memory, turn=turn: seen.append(memory - turn)
        if turn % 2:
            device.launch(activations.pop(), check)
        pool.prefetch(pages)
        if turn % 3 == 0:  # asked for too early: they leave before anybody has used them
            pool.evict()
            activations.append(device.empty(4 * KIB))
            device.launch(activations[-1], lambda memory, turn=turn: memory.fill_(turn))
        at = order.randrange(len(pages))
        with pool.on_device([pages[at]]):
            launch(device, pages[at], lambda buffer, n=expected[at]: seen.append(buffer - n))
            launch(device, pages[at], lambda buffer: buffer.add_(1))
        expected[at] += 1
        while activations:
            device.launch(activations.pop(), check)
        del activation
        pool.evict() if order.random() < 0.5 else pool.vacate()
        if order.random() < 0.5:
            pool.wait()
    device.synchronize()
    assert len(seen) == 434 and not any(bool(one.any()) for one in seen)
    pool.wait()
    before = len(device.blocks)
    kept = [device.empty(4 * KIB) for _ in range(3)]
    assert len(device.blocks) == before and len(kept) == 3


def test_the_allocator_is_told_once_who_uses_a_buffer(device: SimulatedCuda, pool: PagePool) -> None:
    owner = Owner()
    pages = pool.allocate(owner, 20 * KIB, 1).pages
    for page in pages * 3:  # through the three buffers that the budget has
        with pool.on_device([page]):
            launch(device, page, lambda buffer: buffer.add_(1))
    pool.wait()
    assert device.recorded == 2 * 3
    with device.on(device.streams["default"]):
        for _ in range(2):
            with pool.on_device([pages[-1]]):
                launch(device, pages[-1], lambda buffer: buffer.add_(1))
    assert device.recorded == 2 * 3 + 1


def test_a_page_that_nothing_used_leaves_after_it_came(
    device: SimulatedCuda, pool: PagePool, monkeypatch: pytest.MonkeyPatch
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
    device.synchronize()
    assert page.stored and not seen[0].any()


def _next_or_refuse(buffers: Iterator[Tensor], size: int, **options: Any) -> Tensor:
    if "pin_memory" in options:
        return torch.empty(size, dtype=torch.uint8)
    for buffer in buffers:
        return buffer
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_only_files_take_a_thread_which_has_the_device(
    device: SimulatedCuda, pool: PagePool, host: dict[str, Any]
) -> None:
    """Copies between memories are queued by whoever asks for them."""
    owner = Owner()
    pages = pool.allocate(owner, 20 * KIB, 1).pages
    for page in pages * 2:
        with pool.on_device([page]):
            launch(device, page, lambda buffer: buffer.add_(1))
    pool.wait()
    assert [name.split("_")[0] for name in device.threads] == (["qlora-pages"] if host else [])
    assert pool.statistics().moved_in_bytes > 0


def test_pages_that_move_together_share_an_event(device: SimulatedCuda, pool: PagePool, host: dict[str, Any]) -> None:
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
    before = len(device.current_stream().work)
    with standing_still(device), pool.on_device(pages, writes=False):
        assert len(device.current_stream().work) - before == (3 if host else 1)


def test_pages_vacate_together(device: SimulatedCuda, pool: PagePool, host: dict[str, Any]) -> None:
    owner = Owner()
    pages = pool.allocate(owner, 12 * KIB, 1).pages
    for page in pages:
        with pool.on_device([page]):
            pass
    pool.vacate()
    pool.wait()
    assert host or len({id(page.left) for page in pages}) == 1
    found = pool.statistics()
    assert found.paged_pages == 3 and found.device_bytes == 0


def test_pages_vacate_as_far_as_the_host_has_room(device: SimulatedCuda) -> None:
    pool, owner, seen = PagePool(budget=12 * KIB, page_bytes=4 * KIB, host_budget=8 * KIB), Owner(), list[Tensor]()
    pages = pool.allocate(owner, 12 * KIB, 1).pages
    with pool.on_device(pages):
        for number, page in enumerate(pages):
            launch(device, page, lambda buffer, number=number: buffer.fill_(number))
    pool.vacate()
    assert [page.where for page in pages] == [Where.HOST, Where.HOST, Where.DEVICE]
    pool.wait()
    with pool.on_device(pages, writes=False):
        for page in pages:
            launch(device, page, lambda buffer: seen.append(buffer.clone()))
    device.synchronize()
    assert [one.unique().tolist() for one in seen] == [[0], [1], [2]]
    pool.close()


@contextlib.contextmanager
def standing_still(device: SimulatedCuda) -> Iterator[None]:
    """Nothing runs meanwhile."""
    order, device.order = device.order, lambda: ""
    yield
    device.order = order


def test_a_copy_that_fails_is_told(device: SimulatedCuda, pool: PagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    [page] = pool.allocate(owner, 100, 1).pages
    with pool.on_device([page]):
        pass

    def fail(*_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(CudaStreams, "copy_out", fail)
    pool.evict()
    with pytest.raises(ModelStateError, match=r"lost on its way to the host \(device lost\)"):
        pool.acquire([page])
