"""insert_adapters: linear(x, W) -> linear(x, W) + linear(linear(dropout(x), A), B) * alpha * weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.errors import ConfigError
from qlora_compile.modules import QLoRALinear, adapter_parameters, adapter_sites
from qlora_compile.passes import insert_adapters, normalize_linear, quantize_weights

OUT, IN = 21, 37
BEFORE = (normalize_linear, quantize_weights)


class TwoLayers(nn.Module):
    """up [53, 37] with bias and down [21, 53] without; `use` may do something else with them."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, 53), nn.Linear(53, OUT, bias=False)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x) if self.use is not None else self.down(F.silu(self.up(x)))


@pytest.mark.parametrize("x_shape", [(2, 5, IN), (7, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_branch_is_added_and_trains(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None], x_shape: tuple[int, ...], bias: bool
) -> None:
    model, x = nn.Linear(IN, OUT, bias=bias), torch.randn(x_shape, requires_grad=True)
    t = traced(model, x)
    t.run(*BEFORE)
    base = t().detach()
    assert t.count(insert_adapters) == 1
    assert t.targets() == ["dequantize_4bit", "linear", "linear", "linear", "mul", "mul", "add"]
    (site,) = adapter_sites(model).values()
    assert (tuple(site.a().shape), tuple(site.b().shape)) == ((3, IN), (OUT, 3))
    torch.testing.assert_close(t(), base, atol=0, rtol=0)  # B is still zero
    fill_adapters(model)
    a, b = site.a().detach().clone().requires_grad_(), site.b().detach().clone().requires_grad_()
    own_x = x.detach().clone().requires_grad_()
    expected = base + (own_x @ a.T) @ b.T * (5 / 3) * 0.7
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    expected.backward(cotangent)
    y, _, da, db = t.numbers(x, site.a(), site.b())
    # fp32, the same products in the same order, but two factors multiplied one by one
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(da, a.grad, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(db, b.grad, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(model(x), y, atol=2e-5, rtol=2e-5)  # one fp32 sum instead of two


def test_twice_is_the_same_as_once(traced: Callable[..., Any]) -> None:
    model = TwoLayers()
    t = traced(model, torch.randn(2, 5, IN))
    assert t.count(*BEFORE, insert_adapters) == 2
    once, parameters = t.text(), adapter_parameters(model)
    assert t.count(insert_adapters) == 0
    assert t.text() == once
    assert [id(p) for p in adapter_parameters(model)] == [id(p) for p in parameters]


def test_linears_that_share_a_weight_share_its_adapter(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    model = TwoLayers(lambda m, x: m.up(x) - 2 * m.up(x.roll(1)))
    t = traced(model, torch.randn(7, IN))
    assert t.count(*BEFORE, insert_adapters) == 2
    assert len(adapter_parameters(model)) == 2
    assert sum(ref.name == "up.lora_A" for ref in t.ctx.state.values()) == 1
    fill_adapters(model)
    x = next(value for name, value in t.values.items() if name == "l_x_")
    torch.testing.assert_close(t(), model(x), atol=0, rtol=0)


def test_a_retrace_finds_its_adapters_in_the_graph(traced: Callable[..., Any]) -> None:
    model, x = TwoLayers(), torch.randn(7, IN)
    traced(model, x).run(*BEFORE, insert_adapters)
    t = traced(model, x)
    t.run(*BEFORE)
    before = t.text()
    assert t.count(insert_adapters) == 0
    assert t.text() == before
    assert t.targets().count("linear") == 6


def test_rank_zero_only_quantizes(traced: Callable[..., Any]) -> None:
    model = TwoLayers()
    t = traced(model, torch.randn(7, IN), r=0)
    t.run(*BEFORE)
    before = t.text()
    assert t.count(insert_adapters) == 0
    assert t.text() == before
    assert adapter_parameters(model) == []
    assert len(adapter_sites(model)) == 2


def test_rank_and_alpha_patterns(traced: Callable[..., Any]) -> None:
    model = TwoLayers()
    t = traced(model, torch.randn(7, IN), rank_pattern={"down": 4}, alpha_pattern={"up": 9}, use_rslora=True)
    assert t.count(*BEFORE, insert_adapters) == 2
    up, down = adapter_sites(model).values()
    assert (up.rank(), down.rank()) == (3, 4)
    scales = [node.args[1] for node in t.nodes("mul") if isinstance(node.args[1], float)]
    assert scales == pytest.approx([9 / 3**0.5, 5 / 4**0.5])


def test_a_rank_of_zero_for_one_layer(traced: Callable[..., Any]) -> None:
    model = TwoLayers()
    t = traced(model, torch.randn(7, IN), rank_pattern={"down": 0})
    assert t.count(*BEFORE, insert_adapters) == 1
    assert [len(site.adapters) for site in adapter_sites(model).values()] == [1, 0]


def test_a_rank_larger_than_both_dimensions_is_an_error(traced: Callable[..., Any]) -> None:
    t = traced(TwoLayers(), torch.randn(7, IN), r=54)
    with pytest.raises(ConfigError, match=r"r=54 is larger than both dimensions of up \(53 x 37\)"):
        t.run(*BEFORE, insert_adapters)


def test_dropout_stands_in_the_branch_in_training_only(traced: Callable[..., Any]) -> None:
    x = torch.randn(7, IN)
    model = TwoLayers()
    t = traced(model, x, lora_dropout=0.25)
    t.run(*BEFORE, insert_adapters)
    dropouts = t.nodes("dropout")
    assert [node.args[1:] for node in dropouts] == [(0.25, True)] * 2
    model = TwoLayers().eval()
    t = traced(model, x, lora_dropout=0.25)
    assert t.count(*BEFORE, insert_adapters) == 2
    assert "dropout" not in t.targets()


def test_a_parameter_of_another_module_s_code_has_no_dropout(traced: Callable[..., Any]) -> None:
    """Eager code adds its adapters to the weight: there is no x to drop from."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(OUT, IN))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T

    t = traced(Raw(), torch.randn(7, IN), lora_dropout=0.25)
    assert t.count(*BEFORE, insert_adapters) == 1
    assert "dropout" not in t.targets()


# --- a dense base: `quantize=False` ---


def test_a_dense_base_gets_adapters_too(traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]) -> None:
    model, x = TwoLayers(), torch.randn(2, 5, IN)
    weights = [model.up.weight, model.down.weight]
    t = traced(model, x, quantize=False)
    assert t.count(*BEFORE, insert_adapters) == 2
    assert "dequantize_4bit" not in t.targets()
    assert [model.up.weight, model.down.weight] == weights
    assert isinstance(model.up, QLoRALinear)
    fill_adapters(model)
    torch.testing.assert_close(t(), model(x), atol=0, rtol=0)


DENSE_DECLINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any], str]] = {
    "not a target": (lambda m, x: m.up(x), {"target_modules": ["q"]}, "target_modules does not name it"),
    "excluded": (lambda m, x: m.up(x), {"exclude_modules": ["up"]}, "exclude_modules names it"),
    "both ways": (lambda m, x: m.up(x) @ m.up.weight, {}, "it is used both as W and as its transpose"),
    "other code": (
        lambda m, x: F.linear(x, m.up.weight),
        {},
        "its weight is dense and another module's code uses it",
    ),
}


@pytest.mark.parametrize("name", DENSE_DECLINED)
def test_each_guard_for_a_dense_base_declines_with_its_reason(traced: Callable[..., Any], name: str) -> None:
    use, options, reason = DENSE_DECLINED[name]
    model = TwoLayers(use)
    t = traced(model, torch.randn(7, IN), quantize=False, **options)
    t.run(*BEFORE)
    before = t.text()
    assert t.declined(insert_adapters) == {"up": reason}
    assert t.text() == before
    assert adapter_sites(model) == {}


def test_a_peft_model_keeps_its_own_adapters(traced: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(TwoLayers(), peft.LoraConfig(r=3, target_modules=["up"]))
    t = traced(model, torch.randn(7, IN))
    t.run(*BEFORE)
    before = t.text()
    assert t.declined(insert_adapters) == {}
    assert t.text() == before


def test_no_linear_no_change(traced: Callable[..., Any]) -> None:
    t = traced(nn.LayerNorm(IN), torch.randn(7, IN))
    before = t.text()
    assert t.declined(*BEFORE, insert_adapters) == {}
    assert t.text() == before
