"""What is known of a linear before tracing: subclasses that are still linears, and weights that a parent reads itself."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.modules import adapter_sites
from qlora_compile.weight_reads import own_forward_is_linear, weights_read_directly


class ByProduct(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class ByFunction(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, bias=self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2, self.bias)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return torch.topk(F.linear(input, self.weight, self.bias), 2)


class WithoutItsBias(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


class Branches(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 0 else input


@pytest.mark.parametrize(
    ("cls", "bias", "expected"),
    [
        (ByProduct, True, True),
        (ByProduct, False, True),
        (ByFunction, True, True),
        (ByFunction, False, True),
        (WithoutItsBias, False, True),
        (WithoutItsBias, True, False),  # its bias is not used: QLoRALinear would add it
        (Scaled, False, False),
        (Router, False, False),
        (Branches, False, False),
    ],
)
def test_a_subclass_is_a_linear_only_if_it_computes_one(cls: type[nn.Linear], bias: bool, expected: bool) -> None:
    assert own_forward_is_linear(cls(7, 5, bias=bias)) is expected


def test_such_a_subclass_is_prepared_like_any_linear() -> None:
    model, x = nn.Sequential(ByProduct(37, 21), nn.SiLU(), Scaled(21, 5)), torch.randn(3, 37)
    qc.prepare(model, {"r": 2, "compute_dtype": "float32"})
    assert list(adapter_sites(model)) == ["0"]
    with torch.no_grad():
        adapter_sites(model)["0"].b().normal_()
        site = adapter_sites(model)["0"]
        dense = site.weight.dequantize() + site.scaling() * site.b() @ site.a()
        hidden = F.silu(F.linear(x, dense, model[0].bias))
        # fp32 sums of at most 37 terms, in another order
        torch.testing.assert_close(model(x), F.linear(hidden, model[2].weight * 2, model[2].bias), atol=1e-5, rtol=1e-5)


class Mixer(nn.Module):
    """Reads `out`'s weight itself; looks at, slices or initializes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.sliced = nn.Linear(8, 6), nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.inner.weight.data.mul_(2)
        self.use_slices = False

    def _init_weights(self) -> None:
        nn.init.zeros_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.to(self.inner.weight.dtype))
        if self.use_slices:
            return F.linear(h, self.sliced.weight[:2])
        return torch.tanh(h) @ self.out.weight.t() + self.sliced(h)


def test_a_weight_that_the_parents_code_reads() -> None:
    assert weights_read_directly(Mixer()) == {"out": "Mixer"}


def test_prepare_leaves_it_dense_and_says_so_unless_it_may_trace() -> None:
    config = {"r": 2, "compute_dtype": "float32", "exclude_modules": ()}
    with pytest.warns(UserWarning, match="out stays dense: Mixer reads its weight directly.*example_inputs"):
        model = qc.prepare(Mixer(), config)
    assert sorted(adapter_sites(model)) == ["inner", "sliced"]
    compiled = torch.compile(model, backend="qlora", options={"lowering": "aot_eager"})
    compiled(torch.randn(3, 8))
    assert sorted(adapter_sites(model)) == ["inner", "sliced"]  # an optimizer made after prepare holds all there is
    skipped = [reason for p in qc.explain(model).passes for name, reason in p.declined if name == "out"]
    assert skipped and "example_inputs" in skipped[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = qc.prepare(Mixer(), config, example_inputs=(torch.randn(3, 8),))
    assert sorted(adapter_sites(traced)) == ["inner", "out", "sliced"]
