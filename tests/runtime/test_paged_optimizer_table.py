"""The kernel's table: what a window costs the host beside its launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_compile as qc
from qlora_compile.runtime import paged_optimizer_sweep
from qlora_compile.runtime.paged_optimizer_plan import Rows, Table


class Counted(TorchDispatchMode):
    """Operators that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("late", [False, True])
def test_a_window_takes_no_operator(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """A slice costs microseconds, while the device waits for the launch."""
    tables, given = list[Table](), list[Rows]()

    class Kept(Table):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            tables.append(self)

    monkeypatch.setattr(paged_optimizer_sweep, "Table", Kept)
    monkeypatch.setattr(paged_optimizer_sweep.kernels, "find", lambda op, device: lambda *args: None)
    monkeypatch.setattr(paged_optimizer_sweep, "defers", lambda pool: late)
    params = [nn.Parameter(torch.randn(31, 97)) for _ in range(9)]
    optimizer = qc.PagedAdamW(params, device_budget="64KiB")
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    [table] = tables
    windows = len(table._order.calls)
    with Counted() as counted:
        for number in range(windows):
            for page, _, _ in table._order.runs[number]:
                optimizer.pool.acquire([table._plan.pages[page]])
            given += table.calls(number)
            for page, _, _ in table._order.runs[number]:
                optimizer.pool.release([table._plan.pages[page]])
    assert windows > 3 and not counted.seen
    assert torch.equal(torch.cat([rows.pieces for rows in given]), table._there)
