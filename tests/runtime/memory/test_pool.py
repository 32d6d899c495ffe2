"""The page pool: contents survive any order of moves, budgets hold, nothing leaks, refusals change nothing."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_compile.errors import MemoryBudgetError
from qlora_compile.runtime.memory import Allocation, PagePool, format_bytes, page_bytes_for, parse_bytes
from qlora_compile.runtime.memory.tiers import FileTier

KIB = 1024


class Owner:
    """Anything that can be referred to weakly."""


def fill(pool: PagePool, allocation: Allocation, value: int) -> None:
    for span in allocation.spans:
        with pool.on_device([span.page]):
            view(span, allocation).fill_(value % 251)


def view(span: Any, allocation: Allocation) -> Tensor:
    assert span.page.buffer is not None
    return span.page.buffer[span.offset : span.offset + span.count * allocation.item_bytes]


def holds(pool: PagePool, allocation: Allocation, value: int) -> bool:
    found = True
    for span in allocation.spans:
        with pool.on_device([span.page], writes=False):
            found &= bool((view(span, allocation) == value % 251).all())
    return found


@pytest.fixture(params=["ram", "file", "ram then file"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {
        "ram": {},
        "file": {"folder": tmp_path, "host_budget": 0},
        "ram then file": {"folder": tmp_path, "host_budget": 48 * KIB},
    }
    return options[request.param]


def test_contents_survive_any_order_of_moves(host: dict[str, Any]) -> None:
    pool = PagePool(budget=64 * KIB, **host)
    assert pool.page_bytes == 8 * KIB
    owners = [Owner() for _ in range(60)]
    order = random.Random(3)
    # One item has 8 bytes; sizes from a few bytes to several pages, none a multiple of anything.
    sizes = [order.choice([1, 3, 97, 700, 97 * 97 // 2]) for _ in owners]
    parts = [pool.allocate(owner, size, 8) for owner, size in zip(owners, sizes)]
    for value, part in enumerate(parts):
        fill(pool, part, value)
    for _ in range(200):
        value = order.randrange(len(parts))
        pool.prefetch(order.choice(parts).pages[:2])
        assert holds(pool, parts[value], value)
        if order.random() < 0.3:
            fill(pool, parts[value], value)
        if order.random() < 0.05:
            pool.budget = order.choice([8 * KIB, 64 * KIB, 200 * KIB])
    pool.wait()
    found = pool.statistics()
    assert found.moved_out_bytes > 0 and found.moved_in_bytes > 0 and found.misses > 0 and found.hits > 0
    assert found.peak_device_bytes <= 200 * KIB
    assert found.resident_pages + found.paged_pages == found.pages
    assert (found.file_bytes > 0) == ("folder" in host) and (found.host_bytes > 0) == (host.get("host_budget") != 0)
    kinds = {event.kind for event in pool.events}
    assert {"create", "page_in", "page_out", "budget"} <= kinds


def test_new_pages_read_as_zeros() -> None:
    pool, owner = PagePool(budget=16 * KIB), Owner()
    for _ in range(3):  # buffers are used again
        part = pool.allocate(owner, 5000, 8)
        assert holds(pool, part, 0)
        fill(pool, part, 7)
        pool.free(part)
        pool.free(part)


def test_the_device_never_holds_more_than_the_budget() -> None:
    pool = PagePool(budget=32 * KIB)
    owners = [Owner() for _ in range(40)]
    for value, owner in enumerate(owners):
        fill(pool, pool.allocate(owner, 1000, 8), value)
    pool.wait()
    assert pool.statistics().peak_device_bytes == 32 * KIB


def test_small_tensors_share_a_page_and_only_with_their_kind() -> None:
    pool, owners = PagePool(), [Owner() for _ in range(10)]
    same = {pool.allocate(owner, 10, 8, share="a").pages[0] for owner in owners}
    other = pool.allocate(owners[0], 10, 8, share="b").pages[0]
    assert len(same) == 1 and other not in same


def test_pages_go_with_their_owners_and_holes_are_used_again() -> None:
    pool = PagePool(budget=32 * KIB)
    keeper = Owner()
    kept = pool.allocate(keeper, 100, 8)
    fill(pool, kept, 9)
    for cycle in range(1000):
        owner = Owner()
        part = pool.allocate(owner, 50 + cycle % 3000, 8)
        if cycle % 50 == 0:
            fill(pool, part, cycle)
        del owner, part
    gc.collect()
    pool.wait()
    found = pool.statistics()
    assert found.pages == 1 and holds(pool, kept, 9)
    del keeper, kept
    gc.collect()
    assert pool.statistics().pages == 0
    pool.wait()
    assert pool.statistics().host_bytes == 0
    pool.evict()  # gives spare buffers back
    pool.wait()
    assert pool.statistics().device_bytes == 0


def test_a_full_host_tier_refuses_and_loses_nothing() -> None:
    pool = PagePool(budget=16 * KIB, host_budget=8 * KIB, page_bytes=4 * KIB)
    owners = [Owner() for _ in range(6)]
    parts = [pool.allocate(owner, 512, 8) for owner in owners]  # a page each
    for value, part in enumerate(parts):
        fill(pool, part, value)
    extra = Owner()
    with pytest.raises(MemoryBudgetError, match=r"host memory for pages is full \(8 KiB in use\)"):
        fill(pool, pool.allocate(extra, 512, 8), 99)
    with pytest.raises(MemoryBudgetError, match="full"):
        pool.budget = 4 * KIB
    assert pool.budget == 16 * KIB
    pool.budget = 64 * KIB
    assert all(holds(pool, part, value) for value, part in enumerate(parts))
    fill(pool, pool.allocate(extra, 512, 8), 99)


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = PagePool(budget=16 * KIB, page_bytes=4 * KIB, folder=tmp_path, host_budget=0)
    owners = [Owner() for _ in range(5)]
    parts = [pool.allocate(owner, 512, 8) for owner in owners]

    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for value, part in enumerate(parts[:4]):
        fill(pool, part, value)
    with pytest.raises(MemoryBudgetError, match=r"no room for another page of 4 KiB in .*No space left"):
        fill(pool, parts[4], 4)
    assert all(holds(pool, part, value) for value, part in enumerate(parts[:4]))
    monkeypatch.undo()
    fill(pool, parts[4], 4)
    assert all(holds(pool, part, value) for value, part in enumerate(parts))
    assert list(tmp_path.iterdir()) == []  # the file has no name: it goes with the process


def test_pages_that_are_held_stay() -> None:
    pool, owners = PagePool(budget=8 * KIB, page_bytes=4 * KIB), [Owner(), Owner(), Owner()]
    parts = [pool.allocate(owner, 512, 8) for owner in owners]
    pages = [part.pages[0] for part in parts]
    with pool.on_device(pages[:2]):
        assert pool.evict() == 0 and pool.prefetch(pages[2:]) == 0
        with pytest.raises(MemoryBudgetError, match="give at least 12 KiB"):
            pool.acquire(pages[2:])
        pool.budget = 4 * KIB  # one page too many is held: it leaves afterwards
        assert pages[0].buffer is not None and pages[1].buffer is not None
    pool.wait()
    assert pool.statistics().resident_pages == 1
    assert pool.evict() == 4 * KIB


def test_threads_do_not_disturb_each_other() -> None:
    pool = PagePool(budget=64 * KIB, page_bytes=4 * KIB)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            order = random.Random(seed)
            for _ in range(60):
                owner, value = Owner(), order.randrange(1, 250)
                part = pool.allocate(owner, order.randrange(1, 900), 8, share=seed)
                fill(pool, part, value)
                pool.prefetch(part.pages)
                assert holds(pool, part, value)
        except BaseException as error:  # noqa: BLE001  # reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    gc.collect()
    assert pool.statistics().pages == 0


@pytest.mark.parametrize(
    ("text", "amount"),
    [("24GiB", 24 << 30), ("64 KiB", 65536), ("1.5gb", 1_500_000_000), ("65536", 65536), (8192, 8192), ("5000B", 5000)],
)
def test_sizes_are_read(text: int | str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("value", [-1, "-3GiB", 0, 4095, "1KiB"])
def test_budgets_below_a_page_say_the_least_that_works(value: int | str) -> None:
    with pytest.raises(MemoryBudgetError, match="the least that works is one page of 4096 bytes"):
        PagePool(budget=value)


@pytest.mark.parametrize("value", ["lots", "12 parsecs", "", True, 3.5, None])
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(MemoryBudgetError, match="must be a number of bytes or a size"):
        parse_bytes(value)


def test_a_budget_below_the_page_size_in_use_is_refused() -> None:
    pool = PagePool(budget="1MiB")
    with pytest.raises(MemoryBudgetError, match=r"the least that works with pages of this size is 128 KiB"):
        pool.budget = "64KiB"
    assert pool.budget == 1 << 20


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MemoryBudgetError, match="cannot be written"):
        PagePool(budget="1MiB", folder=tmp_path / "file" / "pages")
    with pytest.raises(MemoryBudgetError, match="nowhere to go"):
        PagePool(budget="1MiB", host_budget=0)


def test_page_sizes_follow_the_budget() -> None:
    assert [page_bytes_for(b) for b in (None, 24 << 30, 1 << 20, 65536, 4096)] == [4 << 20, 4 << 20, 131072, 8192, 4096]
    with pytest.raises(MemoryBudgetError, match="power of two"):
        PagePool(page_bytes=5000)
    assert format_bytes(65536) == "64 KiB" and format_bytes(512) == "512 bytes"
    assert torch.device("cpu") == PagePool().device


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes blocks out of a file")
def test_a_file_gives_its_blocks_back_and_gets_new_ones(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 1 << 16, None)

    def blocks() -> int:
        return os.fstat(tier._file.fileno()).st_blocks

    slots = [tier.allocate() for _ in range(100)]
    assert None not in slots
    full = blocks()
    for slot in slots[3:]:
        tier.free(slot)  # type: ignore[arg-type]
    if blocks() == full:
        pytest.skip("this file system has no holes")
    assert blocks() <= full - 97 * 128
    again = [tier.allocate() for _ in range(97)]
    assert sorted(again) == sorted(slots[3:]) and blocks() >= full  # type: ignore[type-var]
    tier.view(again[0]).fill_(7)  # type: ignore[arg-type]
    assert int(tier.view(again[0]).sum()) == 7 << 16  # type: ignore[arg-type]
    tier.close()
