"""The kernel's table: what a window costs the host beside its launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_compile as qc
from qlora_compile.runtime import paged_optimizer_plan, paged_optimizer_sweep
from qlora_compile.runtime.paged_optimizer_plan import Numbers, Rows, Table


class Counted(TorchDispatchMode):
    """Operators that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class OnCpu:
    """torch, whose GPU and pinned memory are the CPU's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.empty(*size, **options)

    def empty_like(self, other: torch.Tensor, device: Any) -> torch.Tensor:
        return torch.full_like(other, 77)


def test_a_gpu_gets_the_table_and_its_numbers_by_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    here, gpu, tables = torch.device("cpu"), SimpleNamespace(type="cuda"), list[Table]()

    class Both(Table):
        def __init__(self, plan: Any, tasks: Any, windows: Any, device: Any, late: bool) -> None:
            super().__init__(plan, tasks, windows, here, late)
            with Counted() as counted:
                tables.extend([self, Table(plan, tasks, windows, gpu, late)])  # type: ignore[arg-type]
            assert [str(func) for func in counted.seen if "copy" in str(func)] == ["aten.copy_.default"]

    monkeypatch.setattr(paged_optimizer_plan, "torch", OnCpu())
    monkeypatch.setattr(paged_optimizer_sweep, "Table", Both)
    monkeypatch.setattr(paged_optimizer_sweep.kernels, "find", lambda op, device: lambda *args: None)
    monkeypatch.setattr(paged_optimizer_sweep, "defers", lambda pool: True)
    params = [nn.Parameter(torch.randn(31, 97)) for _ in range(3)]
    optimizer = qc.PagedAdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    expected, got = tables
    assert got.numbers.shape == (2, 8) and torch.equal(got.numbers, expected.numbers)
    assert torch.equal(got._there, expected._there) and got._there.data_ptr() != expected._there.data_ptr()
    rows = [[*Numbers.of(group, 1, lion=False), 0.0] for group in optimizer.param_groups]
    assert torch.equal(got.numbers, torch.tensor(rows, dtype=torch.float32))


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
