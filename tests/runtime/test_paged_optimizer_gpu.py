"""Paging on a real GPU: the numbers of torch's AdamW, whatever the budget, the host tier and the way to step.

Without one these are skipped: the order of copies and kernels is tested on a simulated device (memory/test_streams.py),
the kernel under Triton's interpreter (interpreted_triton.py).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import NonFiniteError

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = ((97, 97), (3, 1001), (7,), (640, 97), (300, 411))


def train(steps: int, *dtypes: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """On gradients that are drawn and read on the device, step after step, with nothing that waits for it."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator, device=DEVICE)
    parameters = [nn.Parameter(draw(shape).to(dtype)) for shape, dtype in zip(SHAPES, itertools.cycle(dtypes))]
    paged = options.pop("paged")
    optimizer = (qc.PagedAdamW if paged else torch.optim.AdamW)(parameters, lr=1e-2, weight_decay=0.1, **options)
    for _ in range(steps):
        torch.stack([(p * draw(p.shape).to(p.dtype)).sum().float() for p in parameters]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("host", ["pinned", "file"])
def test_a_small_budget_gives_the_numbers_of_torch(host: str, in_backward: bool, tmp_path: Path) -> None:
    folder = tmp_path if host == "file" else None
    reference, _ = train(30, torch.float32, paged=False, foreach=False)
    whole, _ = train(30, torch.float32, paged=True)
    options = {"device_budget": "256KiB", "page_folder": folder, "step_in_backward": in_backward}
    ours, optimizer = train(30, torch.float32, paged=True, **options)
    found = optimizer.statistics()
    assert found.moved_in_bytes > 0 and found.peak_device_bytes <= 256 * 1024
    for expected, all_there, got in zip(reference, whole, ours):
        assert torch.equal(all_there, got)
        # 30 steps of 1e-2: the kernel rounds decay and update of a parameter once, torch each (a bit of each step's sum)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_no_type_of_state_or_parameter_depends_on_the_budget() -> None:
    both = torch.float32, torch.bfloat16  # and a window with pieces of both takes two calls
    for dtypes, bits in itertools.product(([both[0]], [both[1]], both), (8, 32)):
        whole, _ = train(20, *dtypes, paged=True, state_bits=bits)
        paged, _ = train(20, *dtypes, paged=True, state_bits=bits, device_budget="128KiB")
        assert all(torch.equal(a, b) for a, b in zip(whole, paged))


def test_what_is_not_finite_is_skipped_in_backward() -> None:
    parameters = [nn.Parameter(torch.ones(50, 97, device=DEVICE)) for _ in range(2)]
    optimizer = qc.PagedAdamW(parameters, lr=1e-2, step_in_backward=True)
    (parameters[0].sum() * torch.inf + parameters[1].sum()).backward()
    with pytest.raises(NonFiniteError, match="number 0 among them"):
        optimizer.step()
    assert bool((parameters[0] == 1).all()) and bool((parameters[1] != 1).all())
