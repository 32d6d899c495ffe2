"""What a paged optimizer does for a backward pass: when states come, and how gradients are stepped together."""

from __future__ import annotations

import torch
from torch import nn

import qlora_compile as qc


def make_params(count: int = 6) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(67, 41, generator=generator)) for _ in range(count)]


def accumulated(optimizer: qc.PagedAdamW, params: list[nn.Parameter], passes: int) -> list[int]:
    """A step of so many backward passes, as a compiled graph's ops ask for states -> pages that are there after each."""
    numbers, found = list(range(len(params))), []
    for number in range(passes):
        for half in (numbers[3:], numbers[:3]):
            optimizer.pager.prefetch(half)
        optimizer.pool.wait()
        found.append(optimizer.statistics().resident_pages)
        for index, param in enumerate(params):
            gradient = torch.full_like(param, 0.1 + index - number)
            param.grad = gradient if param.grad is None else param.grad + gradient
    optimizer.step()
    optimizer.zero_grad()
    return found


def test_states_come_in_the_last_of_several_backward_passes() -> None:
    """By the step before; where there are fewer the step fetches them, where there are more they came too early."""
    params, expected = make_params(), make_params()
    paged = qc.PagedAdamW(params, lr=1e-2, device_budget="128KiB")
    whole = qc.PagedAdamW(expected, lr=1e-2)
    found = []
    for passes in (3, 3, 2, 2, 4, 4, 1, 1):
        found.append(accumulated(paged, params, passes))
        accumulated(whole, expected, passes)
    there = found[1][-1]
    assert there > 0
    early = [[bool(pages) for pages in one] for one in found]
    assert early[0] == [False] * 3  # no state yet
    assert early[1] == [False, False, True]
    assert early[2:4] == [[False, False], [False, True]]
    assert early[4:6] == [[False, True, True, True], [False, False, False, True]]
    assert early[6:] == [[False], [True]]
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_a_pass_that_failed_is_not_counted() -> None:
    params = make_params()
    optimizer = qc.PagedAdamW(params, lr=1e-2, device_budget="128KiB")
    for _ in range(2):
        accumulated(optimizer, params, 2)
    optimizer.pager.prefetch([3, 4, 5])
    optimizer.zero_grad()
    assert [bool(pages) for pages in accumulated(optimizer, params, 2)] == [False, True]
