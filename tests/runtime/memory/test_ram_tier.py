"""Main memory for pages: extents of several, as much as the limit leaves, given back when empty."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from qlora_compile.errors import MemoryBudgetError
from qlora_compile.runtime.memory.tiers import RamTier

PAGE = 4096


def test_slots_are_apart_and_an_empty_extent_goes_back() -> None:
    tier = RamTier(PAGE, None, pinned=False)
    slots: list[Any] = [tier.allocate() for _ in range(20)]
    assert len(set(slots)) == 20 and tier.used_bytes == 20 * PAGE
    for number, slot in enumerate(slots):
        tier.view(slot).fill_(number)
    assert [tier.view(slot).unique().tolist() for slot in slots] == [[number] for number in range(20)]
    assert len({tier.view(slot).untyped_storage().data_ptr() for slot in slots}) == 2
    first = weakref.ref(tier.view(slots[0]))
    for slot in slots[:15]:
        tier.free(slot)
    assert tier.view(slots[15]).unique().tolist() == [15] and first() is not None  # the sixteenth holds the extent
    tier.free(slots[15])
    assert first() is None and tier.used_bytes == 4 * PAGE
    again: Any = tier.allocate()
    assert tier.view(again).untyped_storage().data_ptr() == tier.view(slots[19]).untyped_storage().data_ptr()


def test_no_extent_is_larger_than_the_limit_leaves() -> None:
    tier = RamTier(PAGE, 19 * PAGE + 7, pinned=False)
    slots: list[Any] = [tier.allocate() for _ in range(20)]
    assert slots[-1] is None and None not in slots[:-1]
    assert {tier.view(slot).untyped_storage().nbytes() for slot in slots[:-1]} == {16 * PAGE, 2 * PAGE, PAGE}
    tier.free(slots[4])
    assert tier.allocate() == slots[4] and tier.allocate() is None


def test_where_memory_is_short_single_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, room = torch.empty, 2 * PAGE

    def scarce(size: int, **options: Any) -> torch.Tensor:
        nonlocal room
        if size > room:
            raise RuntimeError("no memory")
        room -= size
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    tier = RamTier(PAGE, None, pinned=False)
    assert [tier.allocate(), tier.allocate()] == [0, 1]
    with pytest.raises(MemoryBudgetError, match=r"no host memory left for a page of 4 KiB \(8 KiB are in use\)"):
        tier.allocate()
    assert tier.used_bytes == 2 * PAGE
