"""Whether a sweep over pages gives the numbers of its reference: two steps of every kind of state, on one device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..memory import Page, Span
from ..paged_optimizer_layout import ParamState, StateLayout
from .cpu_common import DTYPES

_NUMEL = 37 * 97  # the last block is ragged
_TIPPED = 0.01  # of the codes: a last bit that a fused multiply-add rounds otherwise may choose the neighbour


def proves_paged_step(kernel: Callable[..., Any], device: torch.device) -> bool:
    """32-bit and 8-bit, AdamW and Lion, against the reference on the CPU; bf16 and fp16 parameters, which take another
    path, in one case each, for every case is a compilation on the first day."""
    fp32 = [(lion, narrow, torch.float32) for lion, narrow in itertools.product((False, True), (False, True))]
    cases = [*fp32, (False, False, torch.bfloat16), (False, True, torch.float16)]
    return all(
        _proves(kernel, device, StateLayout(lion, narrow, dtype is not torch.float32), dtype)
        for lion, narrow, dtype in cases
    )


def _proves(kernel: Callable[..., Any], device: torch.device, layout: StateLayout, dtype: torch.dtype) -> bool:
    from ..paged_optimizer_plan import Numbers, Task
    from ..paged_optimizer_sweep import update_reference

    generator = torch.Generator("cpu").manual_seed(11)
    start = _drawn(generator, dtype)
    there, here = start.to(device), start.clone()
    spans = [_span(layout, start, place) for place in (device, torch.device("cpu"))]
    group = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for step in (1, 2):
        gradient = _drawn(generator, dtype)
        moved, numbers = gradient.to(device), Numbers.of(group, step, lion=layout.lion)
        coefficients = torch.tensor([(*numbers, 0.0)], dtype=torch.float32, device=device)
        buffer = spans[0].page.buffer
        assert buffer is not None
        place = buffer.data_ptr() + spans[0].offset
        known = place if step == 1 else 0  # in the second step it is read from `places`
        piece = [there.data_ptr(), moved.data_ptr(), known, _NUMEL, 0, 0]  # no sum of the gradient
        table = torch.tensor([piece], dtype=torch.int64, device=device)
        places = torch.tensor([[place, 0]], dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        kernel(table, coefficients, layout.lion, layout.narrow, DTYPES[dtype], _NUMEL, places)
        state = ParamState(layout, _NUMEL, None, None, dtype)  # type: ignore[arg-type]  # of which layout and size are read
        update_reference(Task(here, gradient, state, numbers), spans[1])
    got, expected = (layout.views(span, _NUMEL) for span in spans)
    return _near(there.cpu(), here, dtype) and all(_near(got[name].cpu(), expected[name], dtype) for name in expected)


def _drawn(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """On the CPU, whatever torch's default device and dtype are."""
    return torch.randn(_NUMEL, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def _span(layout: StateLayout, values: Tensor, device: torch.device) -> Span:
    """Fresh state, behind something else in its page."""
    items = -(-_NUMEL // layout.unit)
    page = Page(0, 64 + items * layout.item_bytes, None)
    page.buffer = torch.zeros(page.size, dtype=torch.uint8, device=device)
    span = Span(page, 64, 0, items)
    if layout.master:
        layout.views(span, _NUMEL)["master"].copy_(values)
    return span


def _near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Codes but for a few; fp32 numbers within what those few change, bf16 and fp16 parameters within their rounding."""
    if got.dtype == torch.uint8:
        return bool((got != expected).float().mean() <= _TIPPED)
    loose = max(4 * torch.finfo(got.dtype).eps, 1e-5)
    apart = (got.float() - expected.float()).abs() > loose * (1 + expected.float().abs())
    return bool(apart.float().mean() <= _TIPPED)
