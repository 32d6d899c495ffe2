"""widen_matmuls: what it rewrites where bf16 is slow, what it leaves alone, and that the numbers get no worse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.passes import normalize_linear, widen_matmuls
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import devices, dispatch

pytestmark = pytest.mark.usefixtures("slow_bf16")


class Net(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.proj, self.attend = nn.Linear(24, 33), attend

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(2, 5, 3, 8).transpose(1, 2)
        return self.proj(self.attend(q).transpose(1, 2).reshape(2, 5, 24))


def plain(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def by_hand(q: Tensor) -> Tensor:
    return torch.matmul((q @ q.transpose(2, 3)).softmax(-1), q)


def trace(
    traced: Callable[..., Any], attend: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Any:
    torch.manual_seed(0)
    t = traced(Net(attend).to(dtype), torch.randn(2, 5, 24, dtype=dtype), **options)
    t.ctx.chooser = kernels.choose_kernel
    return t


@pytest.mark.parametrize(
    ("attend", "targets"),
    [(plain, ["wide_linear"]), (by_hand, ["wide_linear", "wide_matmul", "wide_matmul"])],
)
def test_products_are_widened(traced: Callable[..., Any], attend: Callable[..., Tensor], targets: list[str]) -> None:
    t = trace(traced, attend)
    expected = copy.deepcopy(t.model).double()(
        next(iter(v for v in t.values.values() if v.shape == (2, 5, 24))).double()
    )
    before = t()
    assert t.count(normalize_linear, widen_matmuls) == len(targets)
    assert sorted(name for name in t.targets() if name.startswith("wide")) == targets
    after = t()
    assert after.dtype == torch.bfloat16
    assert (after.double() - expected).abs().max() <= (before.double() - expected).abs().max() * 1.25
    assert t.count(widen_matmuls) == 0


def test_fp32_and_a_cpu_with_bf16_stay(traced: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace(traced, plain, torch.float32).count(normalize_linear, widen_matmuls) == 0
    monkeypatch.setattr(devices, "multiplies_natively", lambda dtype: True)
    dispatch.forget_choices()
    assert trace(traced, plain).count(normalize_linear, widen_matmuls) == 0


def test_the_option_switches_it_off(traced: Callable[..., Any]) -> None:
    t = trace(traced, plain, kernels={"dense_linear": "library_gemm"})
    t.run(normalize_linear, widen_matmuls)
    assert "wide_linear" not in t.targets()


def test_without_a_runtime_nothing_is_chosen(traced: Callable[..., Any]) -> None:
    t = trace(traced, plain)
    t.ctx.chooser = None
    assert t.count(normalize_linear, widen_matmuls) == 0
