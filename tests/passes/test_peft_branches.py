"""PEFT's LoRA layers in a trace: their casts, clones and dropouts are read, other kinds of adapter are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qlora_compile.passes import PIPELINE, match_lora

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
OUT, IN, R = 21, 64, 3


def adapted(four_bit: bool = True, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """One linear, in 4 bits or dense, with fp32 adapters whose B is not zero."""
    if four_bit:
        linear = bnb.nn.Linear4bit(IN, OUT, False, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        linear = nn.Linear(IN, OUT, dtype=dtype)
    model = peft.get_peft_model(
        nn.Sequential(linear.to("cpu")), peft.LoraConfig(r=R, target_modules=["0"], **{"lora_alpha": 5, **options})
    )
    return filled(model)


def filled(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def check_one_op(t: Any, wrt: list[Any]) -> Any:
    """The whole pipeline makes one op of it, with the same numbers."""
    before = t.numbers(*wrt)
    t.run(*PIPELINE)
    (op,) = t.nodes("lora_linear")
    assert not {"linear", "dropout", "clone", "bitsandbytes.gemm_4bit"} & set(t.targets())
    assert t.nodes("output")[0].args[0][0].meta["example_value"].dtype == before[0].dtype
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        assert now.dtype == was.dtype
        # PEFT multiplies by A and B in fp32, we in bf16 (8 bits): sums of 64 terms of size about 1
        error = (now.float() - was.float()).norm() / was.float().norm()
        assert error < 0.01
    return op


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("four_bit", [True, False])
def test_the_branch_becomes_part_of_the_op(traced: Callable[..., Any], four_bit: bool, x_dtype: torch.dtype) -> None:
    model = adapted(four_bit, x_dtype)
    x = torch.randn(2, 5, IN, dtype=x_dtype, requires_grad=True)
    t = traced(model, x, compute_dtype="bfloat16")
    op = check_one_op(t, [x, *adapters(model)])
    assert list(op.args[9]) == pytest.approx([5 / R])
    assert op.args[14] == ("nf4" if four_bit else "none")
    assert op.meta["qlora_sites"] == ("base_model.model.0",)


def test_two_adapters_one_of_them_rslora(traced: Callable[..., Any]) -> None:
    model: Any = adapted()
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["0"]))
    model.base_model.set_adapter(["default", "two"])
    filled(model)
    x = torch.randn(7, IN, dtype=torch.bfloat16, requires_grad=True)
    op = check_one_op(traced(model, x), [x, *adapters(model)])
    assert list(op.args[9]) == pytest.approx([5 / R, 6 / 4**0.5])


def test_dropout_is_the_op_s_in_training_and_gone_in_evaluation(traced: Callable[..., Any]) -> None:
    model = adapted(four_bit=False, lora_dropout=0.25)  # evaluating 4 bits on a CPU with AVX-512 is another test
    x = torch.randn(7, IN, dtype=torch.bfloat16)
    t = traced(model.train(), x)
    t.run(*PIPELINE)
    (op,) = t.nodes("lora_linear")
    assert op.args[12] == 0.25
    assert len(op.args[11]) == 1
    t = traced(model.eval(), x)
    check_one_op(t, adapters(model))
    assert t.nodes("lora_linear")[0].args[12] == 0.0


def test_a_layer_whose_adapters_are_disabled_is_the_base_alone(traced: Callable[..., Any]) -> None:
    model: Any = adapted()
    with model.disable_adapter():
        t = traced(model, torch.randn(7, IN, dtype=torch.bfloat16))
        before = t()
        assert all(not result.declined for result in t.run(*PIPELINE))
    (op,) = t.nodes("lora_linear")
    assert op.args[6] == []
    # the same product of the same values, rounded to bf16 (8 bits) from sums in another order
    torch.testing.assert_close(t(), before, atol=2**-6, rtol=2**-7)


def test_an_adapter_with_a_bias_runs_as_traced_and_is_named(traced: Callable[..., Any]) -> None:
    model = adapted(four_bit=False, dtype=torch.float32, lora_bias=True)
    x = torch.randn(7, IN, requires_grad=True)
    t = traced(model, x)
    before = t.numbers(x, *adapters(model))
    assert t.declined(match_lora) == {
        "base_model.model.0": "its adapter 'default' has a bias (lora_bias), which runs as traced"
    }
    t.run(*PIPELINE)
    assert "lora_linear" not in t.targets()
    for was, now in zip(before, t.numbers(x, *adapters(model)), strict=True):
        torch.testing.assert_close(now, was, atol=0, rtol=0)  # untouched


def test_only_the_base_of_an_adapted_layer_is_quantized(traced: Callable[..., Any]) -> None:
    """`quantize=True` on a dense PEFT model: its adapters stay PEFT's, a linear without adapters stays dense."""
    inner = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 5))
    model = filled(peft.get_peft_model(inner, peft.LoraConfig(r=R, target_modules=["0"])))
    t = traced(model, torch.randn(7, IN), quantize=True)
    before = t()
    results = {result.name: result for result in t.run(*PIPELINE)}
    assert results["quantize_weights"].rewrites == 1
    assert ("base_model.model.1", "PEFT gave it no adapter") in results["quantize_weights"].declined
    assert results["insert_adapters"].rewrites == 0
    (op,) = t.nodes("lora_linear")
    assert len(op.args[6]) == 1
    assert t.targets().count("linear") == 1
    assert sorted(name for name, _ in model.named_parameters() if "lora" in name) == [
        "base_model.model.0.lora_A.default.weight",
        "base_model.model.0.lora_B.default.weight",
    ]
    error = (t() - before).norm() / before.norm()
    assert 0.01 < error < 0.2  # 4 bits: about a tenth of the weights' own size
