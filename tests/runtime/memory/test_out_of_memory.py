"""A device whose memory runs out where a page needs some: nothing is taken for what it is not, and what can go on does."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.errors import MemoryBudgetError, ModelStateError
from qlora_compile.runtime.memory import PagePool, mover
from qlora_compile.runtime.memory.copier import Copier
from qlora_compile.runtime.memory.page import Where
from qlora_compile.runtime.memory.stream_copier import StreamCopier

KIB = 1024
SHAPES = ((31, 97), (97, 5), (64, 64), (7,))


class Owner:
    """Anything that can be referred to weakly."""


class Memory:
    """The device's: `left` buffers can still be made (None: any number). New ones are full of garbage."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.refused = 0

    def empty(self, size: int) -> Tensor:
        if self.left == 0:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.left = None if self.left is None else self.left - 1
        return torch.full((size,), 0x3F, dtype=torch.uint8)


class Streams:
    """As CudaStreams, of a device that does everything at once."""

    def __init__(self, memory: Memory) -> None:
        self.empty, self.pinned, self.begin_thread = memory.empty, torch.empty, lambda: None
        self.inward = self.outward = contextlib.nullcontext
        self.came = self.left = self.computed = lambda: SimpleNamespace(synchronize=lambda: None)
        self.in_waits = self.out_waits = lambda event: None
        self.computation_waits = lambda events, buffers: None
        self.zero = Tensor.zero_
        self.copy_in = self.copy_out = Tensor.copy_


class QueueingCopier(StreamCopier):
    pinned = False  # torch needs a GPU to pin memory


@pytest.fixture(params=["a thread copies", "the caller queues copies"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Memory:
    made = Memory()
    if request.param == "a thread copies":
        monkeypatch.setattr(Copier, "empty", lambda self, size: made.empty(size))
    else:
        monkeypatch.setattr(mover, "make_copier", lambda _: QueueingCopier(Streams(made)))  # type: ignore[arg-type]
    return made


@pytest.fixture
def pool(memory: Memory) -> Iterator[PagePool]:
    made = PagePool(budget=16 * KIB, page_bytes=4 * KIB)
    yield made
    made.close()


def pages_of(pool: PagePool, count: int) -> tuple[Owner, list[Any]]:
    owner = Owner()
    return owner, pool.allocate(owner, count * 4 * KIB, 1).pages


def fill_and_evict(pool: PagePool, pages: list[Any]) -> None:
    """1, 2, ... in the pages, which then are on the host."""
    for number, page in enumerate(pages):
        with pool.on_device([page]):
            page.buffer.fill_(number + 1)
    pool.evict()
    pool.wait()


def test_a_page_that_never_came_is_zeros_when_it_does(pool: PagePool, memory: Memory) -> None:
    _owner, pages = pages_of(pool, 6)
    pool.reserve(pages)  # places in the host tier, with garbage in them
    for page in pages:
        tier, slot = page.slot
        pool._mover._tiers[tier].view(slot).fill_(0x3F)
    memory.left = 1
    with pytest.raises(MemoryBudgetError, match="There is no memory on cpu for a page of 4 KiB"):
        pool.acquire(pages[:3])
    assert [page.pins for page in pages] == [0] * 6
    memory.left = None
    for _ in range(2):
        for page in pages:
            with pool.on_device([page], writes=False):
                assert page.buffer is not None and not page.buffer.any()


def test_a_prefetch_that_found_no_memory_is_made_up_for(pool: PagePool, memory: Memory) -> None:
    _owner, pages = pages_of(pool, 4)
    fill_and_evict(pool, pages)
    memory.left = 0
    assert pool.prefetch(pages[:2]) == 2
    pool.wait()
    assert memory.refused == 2
    memory.left = None  # activations are gone
    for number, page in enumerate(pages):
        with pool.on_device([page], writes=False):
            assert bool((page.buffer == number + 1).all())


def test_a_prefetch_that_found_no_memory_and_the_next_one_that_does(pool: PagePool, memory: Memory) -> None:
    _owner, pages = pages_of(pool, 2)
    fill_and_evict(pool, pages)
    memory.left = 0
    pool.prefetch(pages)
    pool.evict()
    pool.wait()
    memory.left = None
    pool.prefetch(pages)
    with pool.on_device(pages, writes=False):
        assert [int(page.buffer[0]) for page in pages] == [1, 2]
    assert memory.refused == 2 and pool.statistics().device_bytes == 8 * KIB


def test_a_page_takes_the_place_of_one_that_nobody_holds(pool: PagePool, memory: Memory) -> None:
    """The budget has room for both, the device does not."""
    _owner, pages = pages_of(pool, 3)
    fill_and_evict(pool, pages)
    memory.left = 1
    for number in (0, 1, 2, 0):
        with pool.on_device([pages[number]], writes=False):
            assert bool((pages[number].buffer == number + 1).all())
    assert memory.refused == 3
    with pytest.raises(MemoryBudgetError), pool.on_device(pages[:2]):
        pass
    assert [page.pins for page in pages] == [0, 0, 0]


def test_without_a_budget_nothing_stays_held(memory: Memory) -> None:
    pool = PagePool(page_bytes=4 * KIB)
    _owner, pages = pages_of(pool, 3)
    memory.left = 1
    with pytest.raises(MemoryBudgetError, match="give a device budget that leaves room"):
        pool.acquire(pages)
    assert [page.pins for page in pages] == [0, 0, 0] and pages[2].where is Where.NEW
    memory.left = None
    with pool.on_device(pages, writes=False):
        assert not any(page.buffer.any() for page in pages)
    pool.close()


# --- the optimizer on it ----------------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(found: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def train(dtype: torch.dtype, disturb: Callable[[Any, int], None], **options: Any) -> list[nn.Parameter]:
    """Three steps; `disturb` comes before each, and a step that raises MemoryBudgetError is done again."""
    found = parameters(dtype)
    optimizer = qc.PagedAdamW(found, lr=1e-2, **options)
    for step in range(3):
        give_gradients(found, step)
        disturb(optimizer, step)
        try:
            optimizer.step()
        except MemoryBudgetError:
            disturb(optimizer, -1)
            optimizer.step()
    optimizer.pool.close()
    return found


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_step_without_memory_changes_nothing(memory: Memory, dtype: torch.dtype, bits: int) -> None:
    """Of bf16 parameters the state has a master copy, which is not taken for written where it was not."""
    expected = train(dtype, lambda optimizer, step: None, state_bits=bits, device_budget="32KiB")
    memory.refused = 0

    def disturb(optimizer: Any, step: int) -> None:
        memory.left = {0: 1, -1: None}.get(step, memory.left)

    got = train(dtype, disturb, state_bits=bits, device_budget="32KiB")
    assert memory.refused > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_prefetch_without_memory_does_not_end_a_step(memory: Memory) -> None:
    expected = train(torch.float32, lambda optimizer, step: None, device_budget="32KiB")

    def disturb(optimizer: Any, step: int) -> None:
        if step != 1:
            return
        pool = optimizer.pool
        pool.evict()
        pool.wait()
        memory.left = 0
        pool.prefetch(sorted(pool._table.pages.values(), key=lambda page: page.number))  # as in a backward pass
        pool.wait()
        assert memory.refused > 0
        memory.left = None

    got = train(torch.float32, disturb, device_budget="32KiB")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_step_goes_on_in_less_memory_than_its_budget(memory: Memory) -> None:
    expected = train(torch.float32, lambda optimizer, step: None, device_budget="32KiB")

    def disturb(optimizer: Any, step: int) -> None:
        optimizer.evict()
        memory.left = 2 if step else None  # what is at work at a time

    got = train(torch.float32, disturb, device_budget="32KiB")
    assert memory.refused > 0
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_step_that_ends_halfway_says_so(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parameters(torch.float32)
    optimizer = qc.PagedAdamW(found, lr=1e-2, device_budget="16KiB")
    give_gradients(found, 0)
    optimizer.step()
    optimizer.evict()
    real, calls = PagePool.acquire, []

    def acquire(pool: PagePool, pages: Any) -> None:
        calls.append(pages)
        if len(calls) == 3:
            raise MemoryBudgetError("There is no memory.")
        real(pool, pages)

    monkeypatch.setattr(PagePool, "acquire", acquire)
    with pytest.raises(ModelStateError, match="others were not: There is no memory"):
        optimizer.step()


def test_evict_has_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Copier.write

    def slow(self: Copier, *args: Any) -> None:
        time.sleep(0.02)
        real(self, *args)

    monkeypatch.setattr(Copier, "write", slow)
    found = parameters(torch.float32)
    optimizer = qc.PagedAdamW(found, lr=1e-2, device_budget="64KiB", page_folder=tmp_path)
    give_gradients(found, 0)
    optimizer.step()
    assert optimizer.evict() > 0 and optimizer.pool._counts.device_bytes == 0
    del optimizer
    gc.collect()


@pytest.mark.parametrize("budget", [12 * KIB, None])
def test_a_page_whose_copy_could_not_begin_is_not_there(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer holds what another page left in it."""
    pool, owner = PagePool(budget=budget, page_bytes=4 * KIB), Owner()
    pages = pool.allocate(owner, 8 * KIB, 1).pages
    for value, page in enumerate(pages):
        with pool.on_device([page]):
            buffer_of(page).fill_(value + 1)
    pool.evict()
    pool.wait()
    with monkeypatch.context() as patch:
        patch.setattr(pool._mover.copier, "read", refuse_to_read)
        for _ in range(2):
            with pytest.raises(MemoryBudgetError), pool.on_device(pages[:1], writes=False):
                pass
            assert pages[0].where is Where.HOST and pages[0].buffer is None
    for value, page in enumerate(pages):
        with pool.on_device([page], writes=False):
            assert bool((buffer_of(page) == value + 1).all())
    pool.evict()
    pool.wait()
    assert pool.statistics().device_bytes == 0


def buffer_of(page: Any) -> Tensor:
    assert page.buffer is not None
    return page.buffer


def refuse_to_read(*args: Any) -> None:
    raise RuntimeError("no pinned memory is left")
