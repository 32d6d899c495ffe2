"""eager_kernels: products and attention of plain eager calls take the compiled graph's kernels, with numbers no worse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_compile as qc
from qlora_compile.eager_kernels import eager_kernels

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("slow_bf16")


class Ops(TorchDispatchMode):
    """The names of the project's ops that ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qlora":
            self.seen.append(func._opname)
        return func(*args, **kwargs or {})


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, **more: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **more)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).bfloat16()


HEADS = numbers(2, 4, 5, 8), numbers(2, 4, 7, 8), numbers(2, 4, 7, 8)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any], str]] = {
    "linear": (F.linear, (numbers(3, 5, 24), numbers(33, 24)), {}, "wide_linear"),
    "linear with bias": (F.linear, (numbers(1, 24), numbers(33, 24)), {"bias": numbers(33)}, "wide_linear"),
    "matmul": (torch.matmul, (numbers(2, 5, 24), numbers(24, 7)), {}, "wide_matmul"),
    "@": (operator.matmul, (numbers(2, 5, 24), numbers(2, 24, 7)), {}, "wide_matmul"),
    "bmm": (torch.bmm, (numbers(2, 5, 24), numbers(2, 24, 7)), {}, "wide_matmul"),
    "causal": (sdpa, HEADS, {"causal": True}, "attention"),
    "masked": (sdpa, (*HEADS, torch.ones(5, 7, dtype=torch.bool).tril(2)), {"scale": 0.3}, "attention"),
    "grouped": (sdpa, (numbers(2, 6, 5, 8), *(t[:, :3] for t in HEADS[1:])), {"enable_gqa": True}, "attention"),
}


@pytest.mark.parametrize("case", CASES)
def test_bf16_takes_our_kernels_and_is_rounded_once(case: str) -> None:
    function, args, kwargs, op = CASES[case]

    def double(t: Any) -> Any:
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    exact = function(*map(double, args), **{name: double(t) for name, t in kwargs.items()})
    with Ops() as ops, eager_kernels(CPU):
        found = function(*args, **kwargs)
    assert ops.seen == [op]
    # half a unit in the last place of 8 bits, and sums of some 30 products in fp32
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


def test_what_is_left_to_torch() -> None:
    x, q = numbers(3, 8), HEADS[0]
    with Ops() as ops, eager_kernels(CPU):
        F.linear(x.float(), x.float())
        F.linear(x, x[0])
        torch.matmul(x, x[0])
        sdpa(*HEADS, dropout_p=0.5)
        sdpa(q[0], q[0], q[0])
        torch.matmul(q.long(), q.long().mT)
    assert ops.seen == []


def test_mistakes_are_reported_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"), eager_kernels(CPU):
        F.linear(numbers(3, 8), numbers(4, 9))


def test_gradients_pass() -> None:
    x, w = numbers(3, 8).requires_grad_(), numbers(4, 8).requires_grad_()
    with eager_kernels(CPU):
        F.linear(x, w).sum().backward()
    assert x.grad is not None and w.grad is not None
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(4, 8))


def test_adapted_linears_keep_their_one_kernel() -> None:
    """The mode is no reason for a QLoRALinear to run op by op."""
    model = qc.prepare(nn.Sequential(nn.Linear(64, 32)).bfloat16(), qc.QLoRAConfig(r=4))
    x = numbers(3, 64)
    plain = model(x)
    called: list[Any] = []
    model[0].plain_forward = lambda x: called.append(x)
    with eager_kernels(CPU):
        assert torch.equal(model(x), plain)
    assert called == []
