"""Recompilations, training and evaluation, dropout, inference mode, generation: one compiled model in each mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toy_models import (
    AOT_FP32,
    MLP,
    TIGHT,
    Llama,
    compile_model,
    fill,
    graphs_compiled,
    random_tokens,
    same_as_eager,
    take_grads,
)

import qlora_compile as qc
from qlora_compile.modules import adapter_parameters, adapter_sites

# --- recompilations and modes ---


def test_recompilations_for_new_shapes(tiny_llama: Llama) -> None:
    """One for the first shape, one for a new length, one for a new batch size, one for a size of 1; none after that."""
    model = tiny_llama(num_hidden_layers=1)
    compiled = compile_model(model)

    def step(*shape: int) -> Callable[[], Any]:
        tokens = random_tokens(*shape)
        return lambda: compiled(input_ids=tokens, labels=tokens).loss.backward()

    first = [
        graphs_compiled(step(*shape)) for shape in [(2, 7), (2, 7), (2, 9), (2, 11), (3, 9), (4, 13), (1, 9), (1, 12)]
    ]
    assert first == [1, 0, 1, 0, 1, 0, 1, 0]
    assert [graphs_compiled(step(*shape)) for shape in [(5, 6), (2, 7), (3, 9), (1, 12), (7, 21)]] == [0] * 5
    fill(model)
    model.zero_grad()
    for shape in [(2, 7), (3, 9), (1, 12)]:  # each graph has the right numbers
        tokens = random_tokens(*shape)
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        grads = take_grads(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        for mine, theirs in zip(grads, take_grads(model), strict=True):
            torch.testing.assert_close(mine, theirs, **TIGHT)


def test_training_evaluation_and_no_grad_each_compile_once() -> None:
    model, x = MLP(), torch.randn(4, 37)
    compiled = compile_model(model, lora_dropout=0.25)

    def no_grad() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    assert graphs_compiled(lambda: compiled(x)) == 1
    model.eval()
    assert graphs_compiled(lambda: compiled(x)) == 1
    assert graphs_compiled(no_grad) == 1
    model.train()
    assert graphs_compiled(lambda: compiled(x)) == 0
    model.eval()
    assert graphs_compiled(lambda: (compiled(x), no_grad())) == 0
    fill(model)
    torch.testing.assert_close(no_grad(), model(x), **TIGHT)
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)


@pytest.mark.parametrize("prepared", [True, False])
def test_dropout_drops_in_training_only(prepared: bool) -> None:
    """Also where the plain model reads no `training` flag, so that Dynamo alone would guard none."""
    model, x = MLP(), torch.randn(4, 37)
    options = AOT_FP32 | {"lora_dropout": 0.5}
    if prepared:
        qc.prepare(model, options)
    compiled = torch.compile(model, backend="qlora", fullgraph=True, options=None if prepared else options)
    compiled(x)
    fill(model)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), compiled(x))
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)
    model.train()
    assert not torch.equal(compiled(x), compiled(x))


def test_the_mean_over_dropout_seeds_is_the_result_without() -> None:
    model, x = nn.Sequential(nn.Linear(37, 21)), torch.randn(4, 37)
    compiled = compile_model(model, lora_dropout=0.5)
    compiled(x)
    fill(model)
    with torch.no_grad():
        draws = torch.stack([compiled(x) for _ in range(300)])
    error = draws.mean(0) - model.eval()(x)
    # five standard errors of the mean at 84 elements: one chance in 20,000
    assert (error.abs() < 5 * draws.std(0) / 300**0.5).all()


def test_dropout_s_backward_uses_the_forward_s_mask() -> None:
    """Same seed, twice the step along the gradient of B: the output is linear in B, so the difference is exact."""
    model, x = nn.Sequential(nn.Linear(37, 21)), torch.randn(4, 37)
    compiled = compile_model(model, lora_dropout=0.5)
    compiled(x)
    fill(model)
    torch.manual_seed(4)
    before = compiled(x).sum()
    before.backward()
    _, b = adapter_parameters(model)
    grad = b.grad
    assert grad is not None
    step = torch.randn_like(b)
    with torch.no_grad():
        b.add_(step)
    torch.manual_seed(4)
    torch.testing.assert_close(compiled(x).sum() - before, (grad * step).sum(), atol=1e-3, rtol=1e-4)  # fp32 sums of 84


def test_changing_an_adapter_s_weight_recompiles_nothing() -> None:
    model, x = MLP(), torch.randn(4, 37)
    compiled = compile_model(model)
    compiled(x)
    fill(model)
    compiled(x)
    full = compiled(x)
    for site in adapter_sites(model).values():
        site.adapter_weight().fill_(0.25)
    assert graphs_compiled(lambda: compiled(x)) == 0
    assert (compiled(x) - full).abs().max() > 0.1
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)


def test_inference_mode_first_then_training() -> None:
    model, x = MLP(), torch.randn(4, 37)
    compiled = compile_model(model)
    with torch.inference_mode():
        compiled(x)
    fill(model)
    same_as_eager(model, compiled, x)


def test_generate_goes_through_the_compiled_model(tiny_llama: Llama) -> None:
    model, prompt = tiny_llama(num_hidden_layers=1, use_cache=True).eval(), random_tokens(2, 5)
    qc.prepare(model, AOT_FP32)
    fill(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    model.compile(backend="qlora")
    before = counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert counters["stats"]["unique_graphs"] > before
