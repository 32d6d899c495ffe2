"""normalize_linear: every spelling of a linear -> F.linear(x, W, bias)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.passes import normalize_linear

OUT, IN = 21, 37
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Spelled(nn.Module):
    """`spelling(x, w, b)` over a weight of `shape` and a bias."""

    def __init__(self, spelling: Spelling, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(OUT))
        self.register_buffer("table", torch.randn(IN, OUT))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.w, self.b)


NORMAL, TRANSPOSED = (OUT, IN), (IN, OUT)
ANY_RANK: dict[str, tuple[Spelling, tuple[int, int]]] = {
    "x @ w.T": (lambda x, w, b: x @ w.T, NORMAL),
    "x @ w.mT": (lambda x, w, b: x @ w.mT, NORMAL),
    "x @ w.t()": (lambda x, w, b: x @ w.t(), NORMAL),
    "x @ w.transpose(-1, -2)": (lambda x, w, b: x @ w.transpose(-1, -2), NORMAL),
    "x @ w.permute(1, 0)": (lambda x, w, b: x @ w.permute(1, 0), NORMAL),
    "x @ w.t().t().t()": (lambda x, w, b: x @ w.t().t().t(), NORMAL),
    "matmul(x, w.t())": (lambda x, w, b: torch.matmul(x, w.t()), NORMAL),
    "matmul(x, other=torch.t(w))": (lambda x, w, b: torch.matmul(x, other=torch.t(w)), NORMAL),
    "x.matmul(torch.transpose(w, 0, 1))": (lambda x, w, b: x.matmul(torch.transpose(w, 0, 1)), NORMAL),
    "x @ w": (lambda x, w, b: x @ w, TRANSPOSED),
    "matmul(x, w)": (lambda x, w, b: torch.matmul(x, w), TRANSPOSED),
    "x @ w.t().t()": (lambda x, w, b: x @ w.t().t(), TRANSPOSED),
    "linear(x, w)": (lambda x, w, b: F.linear(x, w), NORMAL),
    "linear(x, w, bias=b)": (lambda x, w, b: F.linear(x, w, bias=b), NORMAL),
    "linear(input=x, weight=w, bias=b)": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), NORMAL),
    "linear(x, w.t())": (lambda x, w, b: F.linear(x, w.t(), bias=b), TRANSPOSED),
    "sum of parameters": (lambda x, w, b: x @ (w + w * 0.5).T, NORMAL),
}
ONLY_2D: dict[str, tuple[Spelling, tuple[int, int]]] = {
    "mm(x, w.T)": (lambda x, w, b: torch.mm(x, w.T), NORMAL),
    "x.mm(w)": (lambda x, w, b: x.mm(w), TRANSPOSED),
    "mm(x, mat2=w)": (lambda x, w, b: torch.mm(x, mat2=w), TRANSPOSED),
    "addmm(b, x, w)": (lambda x, w, b: torch.addmm(b, x, w), TRANSPOSED),
    "addmm(b, x, w.t())": (lambda x, w, b: torch.addmm(b, x, w.t()), NORMAL),
    "b.addmm(x, w)": (lambda x, w, b: b.addmm(x, w), TRANSPOSED),
    "addmm(b, mat1=x, mat2=w)": (lambda x, w, b: torch.addmm(b, mat1=x, mat2=w, alpha=1), TRANSPOSED),
    "addmm(input=b, ...)": (lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w), TRANSPOSED),
}
CASES = [(name, (2, 5, IN)) for name in ANY_RANK] + [(name, (7, IN)) for name in [*ANY_RANK, *ONLY_2D]]
PRODUCTS = {"matmul", "mm", "addmm"}


def _non_contiguous(shape: tuple[int, ...]) -> Tensor:
    """[..., k] with a gap after each row and the last two dimensions swapped in memory."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2] + 3).transpose(-1, -2)[..., : shape[-2], :].requires_grad_()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_each_spelling_becomes_one_linear_with_the_same_numbers(
    traced: Callable[..., Any], name: str, shape: tuple[int, ...]
) -> None:
    spelling, weight_shape = (ANY_RANK | ONLY_2D)[name]
    x = _non_contiguous(shape)
    assert not x.is_contiguous()
    t = traced(Spelled(spelling, weight_shape), x)
    wrt = [value for value in t.values.values() if value.requires_grad]
    before = t.numbers(*wrt)
    canonical = t.targets() == ["linear"] and not t.nodes("linear")[0].kwargs and len(t.nodes("linear")[0].args) == 3
    assert t.count(normalize_linear) == (0 if canonical else 1)
    assert t.targets().count("linear") == 1
    assert not PRODUCTS & set(t.targets())
    x_node, _, bias = t.nodes("linear")[0].args
    assert t.values[x_node.name] is x
    assert (bias is not None) == any(value.dim() == 1 for value in t.values.values())
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        # the product may run with the other operand transposed: another summation order, 37 terms of size 1 in fp32
        torch.testing.assert_close(now, was, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [*ANY_RANK, *ONLY_2D])
def test_twice_is_the_same_as_once(traced: Callable[..., Any], name: str) -> None:
    spelling, weight_shape = (ANY_RANK | ONLY_2D)[name]
    t = traced(Spelled(spelling, weight_shape), torch.randn(7, IN))
    t.run(normalize_linear)
    once = t.text()
    assert t.count(normalize_linear) == 0
    assert t.text() == once


@pytest.mark.parametrize(
    ("shape", "views"), [((2, 5, OUT), 0), ((5, 2, OUT), 2), ((10, OUT), 2)], ids=["as before", "swapped", "folded"]
)
def test_views_that_fold_the_leading_dimensions_for_the_product_go(
    traced: Callable[..., Any], shape: tuple[int, ...], views: int
) -> None:
    t = traced(
        Spelled(lambda x, w, b: torch.addmm(b, x.reshape(-1, IN), w).view(shape), TRANSPOSED), torch.randn(2, 5, IN)
    )
    wrt = [value for value in t.values.values() if value.requires_grad]
    before = t.numbers(*wrt)
    assert t.count(normalize_linear) == 1
    assert [name for name in t.targets() if name in ("view", "reshape")] == ["reshape", "view"][:views]
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=2e-5, rtol=2e-5)  # as above


UNCHANGED: dict[str, tuple[Spelling, tuple[int, ...]]] = {
    "activations only": (lambda x, w, b: x @ x.t(), NORMAL),
    "weight on the left": (lambda x, w, b: w @ x.t(), NORMAL),
    "two weights": (lambda x, w, b: (w @ w.T).sum() + x, NORMAL),
    "a batch of weights": (lambda x, w, b: x @ w, (3, IN, OUT)),
    "a vector": (lambda x, w, b: x @ w, (IN,)),
    "no product": (lambda x, w, b: torch.relu(x) + b.sum(), NORMAL),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_what_is_no_linear_is_left_alone(traced: Callable[..., Any], name: str) -> None:
    spelling, weight_shape = UNCHANGED[name]
    t = traced(Spelled(spelling, weight_shape), torch.randn(7, IN))
    before = t.text()
    assert t.declined(normalize_linear) == {}
    assert t.text() == before


def test_a_product_into_a_given_tensor_is_left_alone(traced: Callable[..., Any]) -> None:
    with torch.no_grad():
        t = traced(Spelled(lambda x, w, b: torch.mm(x, w, out=torch.empty(7, OUT)), TRANSPOSED), torch.randn(7, IN))
    assert t.count(normalize_linear) == 0
    assert "mm" in t.targets()


def test_a_buffer_is_no_weight(traced: Callable[..., Any]) -> None:
    class Table(Spelled):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table + self.b

    t = traced(Table(lambda x, w, b: x, NORMAL), torch.randn(7, IN))
    assert t.count(normalize_linear) == 0
    assert "linear" not in t.targets()


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_addmm_with_a_factor_declines(traced: Callable[..., Any], name: str) -> None:
    factor = {name: 0.5}
    t = traced(Spelled(lambda x, w, b: torch.addmm(b, x, w, **factor), TRANSPOSED), torch.randn(7, IN))
    assert t.declined(normalize_linear) == {"addmm": "addmm with alpha or beta other than 1"}
    assert t.targets() == ["addmm"]


def test_addmm_of_a_matrix_declines(traced: Callable[..., Any]) -> None:
    t = traced(Spelled(lambda x, w, b: torch.addmm(x[:, :OUT], x, w), TRANSPOSED), torch.randn(7, IN))
    assert t.declined(normalize_linear) == {"addmm": "addmm adds a tensor of 2 dimensions, a bias has one"}


@pytest.mark.parametrize(
    "cast",
    [lambda w: w.t().to(torch.bfloat16), lambda w: w.to(torch.bfloat16).t(), lambda w: w.t().bfloat16()],
    ids=["transpose then cast", "cast then transpose", "bfloat16()"],
)
def test_casts_between_weight_and_product_stay(traced: Callable[..., Any], cast: Callable[[Tensor], Tensor]) -> None:
    t = traced(Spelled(lambda x, w, b: x @ cast(w), NORMAL), torch.randn(2, 5, IN).bfloat16())
    before = t()
    assert t.count(normalize_linear) == 1
    after = t()
    assert after.dtype == torch.bfloat16
    # one bf16 rounding (2**-8) of sums of about 20
    torch.testing.assert_close(after, before, atol=0.1, rtol=2**-7)


def test_conv1d_of_gpt2_becomes_a_linear(traced: Callable[..., Any]) -> None:
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 5, IN)
    t = traced(Conv1D(OUT, IN), x)
    before = t()
    assert t.targets().count("addmm") == 1
    assert t.count(normalize_linear) == 1
    assert "addmm" not in t.targets()
    torch.testing.assert_close(t(), before, atol=2e-5, rtol=2e-5)  # another summation order in fp32


def test_new_nodes_keep_module_stack_and_source(traced: Callable[..., Any]) -> None:
    t = traced(nn.Sequential(Spelled(lambda x, w, b: x @ w, TRANSPOSED)), torch.randn(7, IN))
    (old,) = t.nodes("matmul")
    stack, trace = old.meta["nn_module_stack"], old.meta["stack_trace"]
    t.run(normalize_linear)
    (new,) = t.nodes("linear")
    assert new.meta["nn_module_stack"] == stack
    assert new.meta["stack_trace"] == trace
    assert new.meta["qlora_made_by"] == ("normalize_linear",)
    assert tuple(new.meta["example_value"].shape) == (7, OUT)
