"""A second derivative through an op that has a first one only: refused by name, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile import attention_ops, expert_ops, linear_cross_entropy, wide_ops  # noqa: F401  define their ops
from qlora_compile.errors import SecondDerivativeError

OPS = torch.ops.qlora
M, K, N, R = 5, 32, 12, 3


def _lora_linear(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    numbers = [1.0], [1], [], 0.0, [N], "none", 64, torch.float32
    return OPS.lora_linear(x, [weight], [], [], [], [], [a], [b], [], *numbers)[0]


def _experts(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    offsets = torch.tensor([M], dtype=torch.int32)
    numbers = [1.0], N, False, "none", 64, torch.float32
    return OPS.grouped_lora_linear(x, offsets, weight[None], [], [a[None]], [b[None]], [torch.ones(())], *numbers)[0]


def _attention(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    heads = x.view(1, 1, M, K)
    return OPS.attention(heads, heads, heads, None, False, 0.3, "fp32")[0]


def _loss(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return OPS.linear_cross_entropy(x, weight, None, torch.arange(M), -100, 1.0, 0.0)


CALLS: dict[str, Callable[..., Tensor]] = {
    "lora_linear": _lora_linear,
    "grouped_lora_linear": _experts,
    "wide_linear": lambda x, a, b, weight: OPS.wide_linear(x, weight, None, wide_ops.LIBRARY).square(),
    "attention": _attention,
    "linear_cross_entropy": _loss,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    x, a, b = (torch.randn(*shape).requires_grad_() for shape in ((M, K), (R, K), (N, R)))
    weight = torch.randn(N, K)
    y = CALLS[name](x, a, b, weight)
    inputs = [x, a, b] if "lora" in name else [x]
    wanted = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    grads = torch.autograd.grad(y.sum(), inputs, create_graph=True)
    assert all(torch.equal(got, want) and got.requires_grad for got, want in zip(grads, wanted, strict=True))
    for grad in grads:
        for differentiate in (lambda g: g.sum().backward(retain_graph=True), lambda g: torch.autograd.grad(g.sum(), x)):
            with pytest.raises(
                SecondDerivativeError, match=f"^qlora::{name} has a first derivative only: .*without torch"
            ):
                differentiate(grad)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).view(1, 1, M, K)
        return F.scaled_dot_product_attention(h, h, h)


def test_a_gradient_penalty_is_refused_to_a_compiled_model_only() -> None:
    options: dict[str, Any] = {"r": 3, "compute_dtype": "float32", "init_lora_weights": False}
    model = qc.prepare(Model(), options)
    compiled = torch.compile(model, backend="qlora", options={"lowering": "eager"})

    def penalty(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (dx,) = torch.autograd.grad(run(x).pow(3).sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.pow(2).sum(), [x, model.linear.lora_A["default"]]))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert all(grad.any() for grad in penalty(model))
        with pytest.raises(SecondDerivativeError):
            penalty(compiled)
