"""quantize_weights: the frozen dense weight of a linear -> 4-bit codes, dequantized where the product needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.errors import InvalidWeightError
from qlora_compile.modules import QLoRALinear, adapter_sites
from qlora_compile.passes import normalize_linear, quantize_weights
from qlora_compile.tensor import QuantizedTensor, quantize_4bit

OUT, IN = 21, 37  # 777 weights: 24 blocks of 32 and a ragged one


class Forward(nn.Module):
    """Modules and parameters by name, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def _dense(weight: Tensor, *, transposed: bool = False, **options: Any) -> Tensor:
    """What the 4-bit weight stands for."""
    return quantize_4bit(weight.detach(), block_size=32, transposed=transposed, **options).dequantize()


@pytest.mark.parametrize("x_shape", [(2, 5, IN), (7, IN), (IN,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_linear_computes_with_the_quantized_weight(
    traced: Callable[..., Any], x_shape: tuple[int, ...], bias: bool, double_quant: bool
) -> None:
    model, x = nn.Linear(IN, OUT, bias=bias), torch.randn(x_shape, requires_grad=True)
    weight = model.weight
    t = traced(model, x, double_quant=double_quant)
    (name,) = [name for name, value in t.values.items() if value is weight]
    t.values[name] = _dense(weight, double_quant=double_quant)
    before = t.numbers(x)
    assert t.count(normalize_linear, quantize_weights) == 1
    assert t.targets() == ["dequantize_4bit", "linear"]
    assert len(t.ctx.state) == (4 if double_quant else 2)
    assert isinstance(model, QLoRALinear)
    assert isinstance(model.weight, QuantizedTensor)
    assert not model.weight.requires_grad
    for was, now in zip(before, t.numbers(x), strict=True):
        torch.testing.assert_close(now, was, atol=0, rtol=0)  # the same values in the same product
    torch.testing.assert_close(t(), model(x), atol=0, rtol=0)


def test_twice_is_the_same_as_once(traced: Callable[..., Any]) -> None:
    """The weight's placeholder has no user left: the second run finds no linear on it."""
    t = traced(nn.Linear(IN, OUT), torch.randn(7, IN))
    t.run(normalize_linear, quantize_weights)
    once = t.text()
    assert t.count(quantize_weights) == 0
    assert t.text() == once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_run_in_the_compute_dtype_and_the_result_has_the_input_s(
    traced: Callable[..., Any], dtype: torch.dtype
) -> None:
    model, x = nn.Linear(IN, OUT).to(dtype), torch.randn(2, 5, IN, dtype=dtype)
    t = traced(model, x, compute_dtype="bfloat16")
    t.run(normalize_linear, quantize_weights)
    assert t.nodes("dequantize_4bit")[0].args[-1] == torch.bfloat16
    assert t.targets().count("to") == (0 if dtype == torch.bfloat16 else 3)  # x, bias, and the result back
    y = t()
    assert y.dtype == dtype
    # eager code may keep the weight in fp32 (the kernel fp32_gemm): each of its roundings to bf16 is 2^-9 of the weight
    torch.testing.assert_close(y, model(x), atol=2**-6, rtol=2**-7)


@pytest.mark.parametrize("conv1d", [True, False])
def test_an_in_out_weight_is_stored_transposed(traced: Callable[..., Any], conv1d: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    own = Forward(lambda m, x: x @ m.w, w=torch.randn(IN, OUT))
    model, x = (Conv1D(OUT, IN) if conv1d else own), torch.randn(2, 5, IN)
    weight = model.weight if conv1d else model.w
    t = traced(model, x)
    (name,) = [name for name, value in t.values.items() if value is weight]
    before = t(**{name: _dense(weight, transposed=True)})
    assert t.count(normalize_linear, quantize_weights) == 1
    (dequantize,) = t.nodes("dequantize_4bit")
    assert list(dequantize.args[4]) == [OUT, IN]
    (site,) = adapter_sites(model).values()
    assert site.fan_in_fan_out
    assert (site.out_features, site.in_features) == (OUT, IN)
    assert isinstance(site.module, QLoRALinear) == conv1d
    torch.testing.assert_close(t(), before, atol=2e-5, rtol=2e-5)  # another summation order in fp32


def test_a_weight_used_twice_is_quantized_once(traced: Callable[..., Any]) -> None:
    model = Forward(lambda m, x: m.l(x) + m.l(x.flip(-1)) @ m.mix.T, l=nn.Linear(IN, OUT), mix=torch.randn(OUT, OUT))
    t = traced(model, torch.randn(2, 5, IN), target_modules=["l"])
    assert t.count(normalize_linear, quantize_weights) == 2
    dequantizes = t.nodes("dequantize_4bit")
    assert len(dequantizes) == 2
    assert len({node.args[:4] for node in dequantizes}) == 1
    assert len(t.ctx.state) == 4
    assert list(adapter_sites(model)) == ["l"]


def test_modules_that_share_a_weight_share_the_quantized_one(traced: Callable[..., Any]) -> None:
    first, second = nn.Linear(IN, OUT), nn.Linear(IN, OUT)
    second.weight = first.weight
    model = Forward(lambda m, x: m.a(x) + m.b(x), a=first, b=second)
    t = traced(model, torch.randn(2, 5, IN))
    assert t.count(normalize_linear, quantize_weights) == 2
    assert first.weight is second.weight
    assert isinstance(first, QLoRALinear)
    assert isinstance(second, QLoRALinear)
    assert list(adapter_sites(model)) == ["a"]
    assert len(t.ctx.state) == 4


def test_a_module_s_weight_used_by_other_code_too_is_read_through_a_property(traced: Callable[..., Any]) -> None:
    """QLoRALinear's forward would be right, but `F.linear(x, m.l.weight)` would miss the adapter."""
    model = Forward(lambda m, x: m.l(x) + F.linear(x, m.l.weight), l=nn.Linear(IN, OUT))
    x = torch.randn(7, IN)
    t = traced(model, x)
    assert t.count(normalize_linear, quantize_weights) == 2
    assert not isinstance(model.l, QLoRALinear)
    assert isinstance(model.l._parameters["weight"], QuantizedTensor)
    assert not isinstance(model.l.weight, QuantizedTensor)
    torch.testing.assert_close(t(), model(x), atol=0, rtol=0)


DECLINED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], dict[str, Any], str]] = {
    "tied to an embedding": (
        lambda: nn.Embedding(OUT, IN),
        lambda m, x: F.linear(x + m.l(torch.tensor([3])), m.l.weight),
        {},
        "its weight is tied to the embedding 'l'",
    ),
    "not a target": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(x),
        {"target_modules": ["q_proj"]},
        "target_modules does not name it",
    ),
    "excluded": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(x),
        {"exclude_modules": "l"},
        "exclude_modules names it",
    ),
    "trained in full": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(x),
        {"modules_to_save": ("l",)},
        "modules_to_save trains it in full",
    ),
    "both ways": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(x) @ m.l.weight,
        {},
        "it is used both as W and as its transpose",
    ),
    "another use": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(x) + m.l.weight.sum(),
        {},
        "something other than a linear uses its weight",
    ),
    "its own input": (
        lambda: nn.Linear(IN, OUT),
        lambda m, x: m.l(m.l.weight),
        {},
        "something other than a linear uses its weight",
    ),
    "double precision": (
        lambda: nn.Linear(IN, OUT, dtype=torch.float64),
        lambda m, x: m.l(x.double()),
        {},
        "its weight is torch.float64",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_each_guard_declines_with_its_reason(traced: Callable[..., Any], name: str) -> None:
    make, forward, options, reason = DECLINED[name]
    x = torch.randn(7, IN)
    model = Forward(forward, l=make())
    t = traced(model, x, **options)
    t.run(normalize_linear)
    before, numbers = t.text(), t()
    assert t.declined(quantize_weights)["l"] == reason
    assert t.text() == before
    assert adapter_sites(model) == {}
    torch.testing.assert_close(t(), numbers, atol=0, rtol=0)


def test_the_output_head_declines(traced: Callable[..., Any]) -> None:
    model = Forward(lambda m, x: m.lm_head(m.l(x)), l=nn.Linear(IN, OUT), lm_head=nn.Linear(OUT, 50))
    t = traced(model, torch.randn(2, 5, IN))
    result = t.run(normalize_linear, quantize_weights)[-1]
    assert result.rewrites == 1
    assert result.declined == (("lm_head", "it is the output head"),)
    assert list(adapter_sites(model)) == ["l"]


def test_a_vector_as_weight_declines(traced: Callable[..., Any]) -> None:
    t = traced(Forward(lambda m, x: F.linear(x, m.w), w=torch.randn(IN)), torch.randn(7, IN))
    assert t.declined(normalize_linear, quantize_weights) == {"w": "its weight has 1 dimensions"}


def test_a_peft_model_s_dense_base_stays(traced: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        Forward(lambda m, x: m.l(x), l=nn.Linear(IN, OUT)), peft.LoraConfig(r=3, target_modules=["l"])
    )
    t = traced(model, torch.randn(7, IN))
    reasons = t.declined(normalize_linear, quantize_weights)
    assert reasons["base_model.model.l"] == "a PEFT model's dense weights stay as they are (quantize='auto')"
    t = traced(model, torch.randn(7, IN), quantize=True)
    assert t.count(normalize_linear, quantize_weights) == 1  # the base, and neither A nor B
    assert t.targets().count("dequantize_4bit") == 1


def test_a_weight_adapted_the_other_way_round_declines(traced: Callable[..., Any]) -> None:
    """A retrace that uses a quantized [out, in] weight as [in, out]: the codes stay, the product runs on the subclass."""
    model = Forward(lambda m, x: m.l(x), l=nn.Linear(IN, OUT))
    traced(model, torch.randn(7, IN)).run(normalize_linear, quantize_weights)
    model.given = lambda m, x: x @ m.l.weight
    x = torch.randn(7, OUT)
    t = traced(model, x)
    assert t.declined(normalize_linear, quantize_weights) == {
        "l": "it was adapted in another graph that uses its transpose"
    }
    torch.testing.assert_close(t(), x @ model.l.weight.dequantize(), atol=2e-5, rtol=2e-5)  # another summation order


def test_a_retrace_finds_the_codes(traced: Callable[..., Any]) -> None:
    model = nn.Linear(IN, OUT)
    traced(model, torch.randn(7, IN)).run(normalize_linear, quantize_weights)
    codes, x = model.weight.codes, torch.randn(2, 5, IN)
    t = traced(model, x)
    before = t()
    assert t.count(normalize_linear, quantize_weights) == 1
    assert model.weight.codes is codes
    assert t.targets().count("dequantize_4bit") == 1
    torch.testing.assert_close(t(), before, atol=0, rtol=0)


def test_quantize_false_changes_nothing(traced: Callable[..., Any]) -> None:
    model = nn.Linear(IN, OUT)
    t = traced(model, torch.randn(7, IN), quantize=False)
    t.run(normalize_linear)
    before = t.text()
    assert t.declined(quantize_weights) == {}
    assert t.text() == before
    assert type(model) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(traced: Callable[..., Any], value: float) -> None:
    model = Forward(lambda m, x: m.up(x), up=nn.Linear(IN, OUT))
    with torch.no_grad():
        model.up.weight[3, 5] = value
    t = traced(model, torch.randn(7, IN))
    with pytest.raises(InvalidWeightError, match=r"^up: The weight holds NaN or infinity"):
        t.run(normalize_linear, quantize_weights)
    assert type(model.up) is nn.Linear  # nothing half done


def test_no_linear_no_change(traced: Callable[..., Any]) -> None:
    t = traced(nn.LayerNorm(IN), torch.randn(7, IN))
    before = t.text()
    assert t.declined(quantize_weights) == {}
    assert t.text() == before
