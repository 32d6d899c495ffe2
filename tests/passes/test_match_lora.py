"""match_lora: a retrace of a parameter that reads as W + B A -> the plain weight with branches beside the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.adapter_edits import add_adapter
from qlora_compile.modules import adapter_parameters, adapter_sites
from qlora_compile.passes import PIPELINE, match_lora, normalize_linear

OUT, IN = 21, 37
Use = Callable[[nn.Module, Tensor], Tensor]
USES: dict[str, tuple[Use, tuple[int, int]]] = {
    "linear(x, w)": (lambda m, x: F.linear(x, m.w), (OUT, IN)),
    "linear(x, w, b)": (lambda m, x: F.linear(x, m.w, m.b), (OUT, IN)),
    "x @ w.T": (lambda m, x: x @ m.w.T, (OUT, IN)),
    "x @ w.T, as torch 2.14 traces it": (lambda m, x: x @ torch.ops.aten.numpy_T(m.w), (OUT, IN)),
    "x @ w": (lambda m, x: x @ m.w, (IN, OUT)),
    "matmul(x, w) + b": (lambda m, x: torch.matmul(x, m.w) + m.b, (IN, OUT)),
    "addmm(b, x, w)": (lambda m, x: torch.addmm(m.b, x.reshape(-1, IN), m.w), (IN, OUT)),
}


class Raw(nn.Module):
    """A module whose own code multiplies by a parameter: its class cannot become QLoRALinear."""

    def __init__(self, use: Use, shape: tuple[int, int]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(OUT))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


@pytest.fixture
def adapted(traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    """A Raw that went through the whole pipeline once, with adapters that are not zero."""

    def make(use: Use, shape: tuple[int, int], **options: Any) -> nn.Module:
        model = Raw(use, shape)
        traced(model, torch.randn(2, 5, IN), **options).run(*PIPELINE)
        fill_adapters(model)
        return model

    return make


@pytest.mark.parametrize("x_shape", [(2, 5, IN), (7, IN)])
@pytest.mark.parametrize("name", USES)
def test_the_adapters_are_taken_out_of_the_weight(
    traced: Callable[..., Any], adapted: Callable[..., nn.Module], name: str, x_shape: tuple[int, ...]
) -> None:
    model, x = adapted(*USES[name]), torch.randn(x_shape, requires_grad=True)
    t = traced(model, x)
    assert "densify" in t.targets()
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    torch.testing.assert_close(before[0], model(x), atol=0, rtol=0)  # the same eager arithmetic
    assert t.count(normalize_linear, match_lora) == 1
    assert "densify" not in t.targets()
    assert t.targets().count("linear") == 3  # the product, A and B
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        # x (W + s B A)^T against x W^T + s (x A^T) B^T in fp32: sums of 37 terms of size up to 10
        torch.testing.assert_close(now, was, atol=1e-4, rtol=1e-4)
    assert t.count(match_lora) == 0


def test_the_whole_pipeline_makes_one_op_of_a_retrace(
    traced: Callable[..., Any], adapted: Callable[..., nn.Module]
) -> None:
    model, x = adapted(*USES["x @ w"]), torch.randn(7, IN, requires_grad=True)
    t = traced(model, x)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    t.run(*PIPELINE)
    assert t.targets() == ["lora_linear", "getitem"]
    assert t.nodes("lora_linear")[0].meta["qlora_sites"] == ("w",)
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=1e-4, rtol=1e-4)  # as above


def test_two_adapters_become_two_branches(traced: Callable[..., Any], adapted: Callable[..., nn.Module]) -> None:
    model, x = adapted(*USES["x @ w.T"]), torch.randn(7, IN)
    add_adapter(model, "second", rank=5, alpha=4, scaling={"w": 0.8})
    with torch.no_grad():
        adapter_sites(model)["w"].b("second").normal_(std=0.3)
    t = traced(model, x)
    before = t()
    assert t.count(normalize_linear, match_lora) == 1
    assert t.targets().count("linear") == 5
    torch.testing.assert_close(t(), before, atol=1e-4, rtol=1e-4)  # another summation order in fp32
    t.run(*PIPELINE[2:])
    op = t.nodes("lora_linear")[0]
    assert [len(op.args[i]) for i in (6, 7, 8)] == [2, 2, 2]
    assert list(op.args[9]) == pytest.approx([5 / 3, 0.8])
    torch.testing.assert_close(t(), before, atol=1e-4, rtol=1e-4)


def test_without_adapters_only_the_weight_is_left(
    traced: Callable[..., Any], adapted: Callable[..., nn.Module]
) -> None:
    model, x = adapted(*USES["x @ w.T"], r=0), torch.randn(7, IN)
    t = traced(model, x)
    before = t()
    assert t.count(normalize_linear, match_lora) == 1
    assert t.targets() == ["linear"]
    torch.testing.assert_close(t(), before, atol=2e-5, rtol=2e-5)  # another summation order in fp32


@pytest.mark.parametrize(
    ("made_with", "used_with"),
    [("linear(x, w)", "other way"), ("x @ w", "other way round")],
    ids=["normal", "[in, out]"],
)
def test_a_weight_used_the_other_way_round_stays_dense(
    traced: Callable[..., Any], adapted: Callable[..., nn.Module], made_with: str, used_with: str
) -> None:
    """The adapter of [out, in] does not fit a product with [in, out]: wrong numbers, were the weight square."""
    model = adapted(*USES[made_with])
    made_transposed = made_with == "x @ w"
    model.use = lambda m, x: F.linear(x, m.w) if made_transposed else x @ m.w  # type: ignore[assignment]
    x = torch.randn(7, OUT)
    t = traced(model, x)
    before = t()
    torch.testing.assert_close(before, model(x), atol=0, rtol=0)
    t.run(*PIPELINE)
    assert "lora_linear" not in t.targets()
    assert "densify" in t.targets()
    torch.testing.assert_close(t(), before, atol=2e-5, rtol=2e-5)  # another summation order in fp32


def test_a_sum_that_is_not_ours_is_left_alone(traced: Callable[..., Any]) -> None:
    """W + B A written by the user, all of it parameters."""

    class OwnDelta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(OUT, IN))
            self.a, self.b = nn.Parameter(torch.randn(3, IN)), nn.Parameter(torch.randn(OUT, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w + self.b @ self.a)

    t = traced(OwnDelta(), torch.randn(2, 5, IN))
    t.run(normalize_linear)
    before = t.text()
    assert t.count(match_lora) == 0
    assert t.text() == before
