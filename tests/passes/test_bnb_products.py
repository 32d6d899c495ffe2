"""match_lora on bitsandbytes' product in its three forms -> linear over dequantized codes, with its own storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile import nf4
from qlora_compile.foreign import unpack
from qlora_compile.passes import PIPELINE, match_lora

bnb = pytest.importorskip("bitsandbytes")
OUT, IN = 21, 64  # an odd number of outputs; bitsandbytes' product wants K to be a multiple of the block


def layer(
    out: int = OUT, k: int = IN, bias: bool = True, quant_type: str = "nf4", double: bool = True, **options: Any
) -> nn.Module:
    made = bnb.nn.Linear4bit(
        k, out, bias, compute_dtype=torch.float32, compress_statistics=double, quant_type=quant_type, **options
    )
    with torch.no_grad():
        made.weight.copy_(torch.randn(out, k))
    made = made.to("cpu")  # quantizes
    if bias:
        made.bias.requires_grad_(False)
    return nn.Sequential(made)


def dense(model: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(model[0].weight.data, model[0].weight.quant_state).float()


@pytest.mark.parametrize("grad", [False, True], ids=["bare", "autograd_function_apply"])
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_the_product_reads_the_codes(traced: Callable[..., Any], quant_type: str, double: bool, grad: bool) -> None:
    model = layer(quant_type=quant_type, double=double, bias=grad)
    x = torch.randn(2, 5, IN, requires_grad=grad)
    t = traced(model, x)
    assert ("autograd_function_apply" in t.targets()) == grad
    before = t.numbers(x) if grad else [t()]
    assert t.count(match_lora) == 1
    assert t.targets().count("linear") == t.targets().count("dequantize_4bit") == 1
    after = t.numbers(x) if grad else [t()]
    # fp32: the same dequantized values, another order of summation at most
    for was, now in zip(before, after, strict=True):
        torch.testing.assert_close(now, was, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[0], F.linear(x, dense(model), model[0].bias), atol=1e-5, rtol=1e-5)
    assert t.count(match_lora) == 0


def test_the_codes_are_the_graph_s_own_input(traced: Callable[..., Any]) -> None:
    t = traced(layer(), torch.randn(3, IN))
    t.run(*PIPELINE)
    assert t.targets() == ["view", "lora_linear", "getitem", "to"]
    assert t.ctx.state == {}  # nothing was added: no copy
    (view,) = t.nodes("view")
    assert view.args[0].op == "placeholder"
    assert t.values[view.args[0].name] is t.model[0].weight
    assert t.nodes("lora_linear")[0].meta["qlora_sites"] == ("0",)


def test_only_the_bias_trains(traced: Callable[..., Any]) -> None:
    model, x = layer(), torch.randn(3, IN)
    model[0].bias.requires_grad_(True)
    t = traced(model, x)
    before = t.numbers(model[0].bias)
    assert t.count(match_lora) == 1
    for was, now in zip(before, t.numbers(model[0].bias), strict=True):
        torch.testing.assert_close(now, was, atol=1e-5, rtol=1e-5)  # fp32, order of summation


def test_codes_stored_as_another_dtype(traced: Callable[..., Any]) -> None:
    """`bnb_4bit_quant_storage`, as FSDP wants it: the same bytes under another name."""
    model, x = layer(out=22, quant_storage=torch.bfloat16), torch.randn(3, IN)
    assert model[0].weight.dtype == torch.bfloat16
    t = traced(model, x)
    assert t.count(match_lora) == 1
    torch.testing.assert_close(t(), F.linear(x, dense(model), model[0].bias), atol=1e-5, rtol=1e-5)  # as above


def test_a_repacked_weight_is_unpacked_into_a_copy(traced: Callable[..., Any]) -> None:
    """What an evaluation on a CPU with AVX-512 leaves behind, made here by the function that makes it."""
    model, x = layer(out=32, bias=False), torch.randn(3, IN, requires_grad=True)
    weight = model[0].weight
    codes, state = weight.data.clone().view(-1), weight.quant_state
    scales = nf4.dequantize_scales(state.absmax, state.state2.absmax, state.offset).bfloat16()
    weight.data, model[0].quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, state)
    copy = unpack(weight)
    assert torch.equal(copy.codes, codes)
    assert torch.equal(copy.absmax, scales.float())  # bitsandbytes has rounded them
    t = traced(model, x)
    assert "bitsandbytes.gemv_4bit" in t.targets()
    assert t.count(match_lora) == 1
    assert len(t.ctx.state) == 2
    values = nf4.dequantize_reference(copy.codes, copy.absmax, None, None, (32, IN), "nf4", 64, torch.float32)
    y, dx = t.numbers(x)
    torch.testing.assert_close(y, F.linear(x, values, model[0].bias).detach(), atol=1e-5, rtol=1e-5)
    assert dx.shape == x.shape  # bitsandbytes' own op has no gradient there


def test_a_weight_that_is_being_repacked_waits_for_the_next_call() -> None:
    """The first evaluation on a CPU with AVX-512 repacks inside the traced code."""
    model, x = layer(out=32).eval(), torch.randn(3, IN)
    state = model[0].weight.quant_state
    scales = nf4.dequantize_scales(state.absmax, state.state2.absmax, state.offset).bfloat16().float()
    codes = model[0].weight.data.clone().view(-1)
    model[0].support_avx512bf16_for_cpu = True
    compiled = torch.compile(model, backend="qlora", options={"lowering": "eager"})
    with torch.no_grad():
        compiled(x)  # bitsandbytes' own op: it needs AVX-512 for its numbers
        declined = dict(item for result in qc.explain(model).passes for item in result.declined)
        assert declined["0"].startswith("bitsandbytes repacks its weight during this very call")
        found = compiled(x)
    values = nf4.dequantize_reference(codes, scales, None, None, (32, IN), "nf4", 64, torch.float32)
    torch.testing.assert_close(found, F.linear(x, values, model[0].bias), atol=1e-5, rtol=1e-5)


def test_another_code_book_stays(traced: Callable[..., Any]) -> None:
    model = layer()
    model[0].weight.quant_state.code = model[0].weight.quant_state.code * 0.5
    t = traced(model, torch.randn(3, IN))
    assert t.declined(match_lora) == {"0": "its code book is not the one of nf4"}
