"""`torch.compile(model, backend="qlora")` end to end: numbers equal eager ones, with and without Inductor; wrong use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
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
from qlora_compile.errors import ConfigError, InvalidWeightError, ModelStateError, NoTargetError, UnknownOptionError
from qlora_compile.modules import adapter_sites, prepared_config

# --- numbers: the same model, compiled and eager ---


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_llama_with_labels_is_one_graph_and_equals_eager(tiny_llama: Llama, lowering: str) -> None:
    model, tokens = tiny_llama(num_hidden_layers=2), random_tokens(2, 7)
    compiled = compile_model(model, lowering=lowering)
    assert graphs_compiled(lambda: compiled(input_ids=tokens, labels=tokens)) == 1
    fill(model)
    out = compiled(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = take_grads(model)
    expected = model(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, **TIGHT)
    torch.testing.assert_close(out.logits, expected.logits, **TIGHT)
    assert len(grads) == 2 * 7 * 2
    for mine, theirs in zip(grads, take_grads(model), strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_gpt2_with_labels_is_one_graph_and_equals_eager() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=211, n_embd=36, n_layer=1, n_head=3, n_positions=64, n_inner=80, bos_token_id=1, eos_token_id=2
    )
    model, tokens = GPT2LMHeadModel(config).eval(), random_tokens(2, 7)
    model.loss_type = "ForCausalLM"  # transformers warns from inside forward without it, which breaks any graph
    compiled = compile_model(model)
    compiled(input_ids=tokens, labels=tokens)
    fill(model)
    assert list(adapter_sites(model)) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    out = compiled(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = take_grads(model)
    expected = model(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, **TIGHT)
    for mine, theirs in zip(grads, take_grads(model), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_in_bf16_equal_eager_within_its_rounding(tiny_llama: Llama, dtype: torch.dtype) -> None:
    model, tokens = tiny_llama(dtype, num_hidden_layers=1), random_tokens(2, 7)
    compiled = compile_model(model, compute_dtype="bfloat16")
    compiled(input_ids=tokens)
    fill(model)
    out, expected = compiled(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert out.dtype == dtype
    # 2**-8 for each of about ten roundings on the way; logits are of size 0.5
    torch.testing.assert_close(out, expected, atol=0.02, rtol=2**-6)
    assert (out - expected).float().abs().mean() < 0.003


@pytest.mark.parametrize("shape", [(2, 5, 37), (7, 37), (1, 37), (37,)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = MLP()
    compiled = compile_model(model)
    compiled(torch.randn(shape))
    fill(model)
    same_as_eager(model, compiled, torch.randn(*shape[:-1], 74)[..., ::2])


def test_gradients_reach_an_input_that_wants_one() -> None:
    model, x = MLP(), torch.randn(4, 37, requires_grad=True)
    compiled = compile_model(model)
    compiled(x)
    fill(model)
    (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs, atol=5e-4, rtol=5e-5)  # the gradient of a sum of 84 squares


def test_a_prepared_model_needs_no_options() -> None:
    model = qc.prepare(MLP(), AOT_FP32)
    fill(model)
    compiled = torch.compile(model, backend="qlora", fullgraph=True)
    same_as_eager(model, compiled, torch.randn(4, 37))
    assert counters["stats"]["unique_graphs"] >= 1


# --- wrong use ---


def test_an_unknown_option_names_the_nearest_and_is_not_wrapped() -> None:
    with pytest.raises(UnknownOptionError, match=r"Unknown option 'lora_alpa': did you mean 'lora_alpha'\?") as caught:
        torch.compile(MLP(), backend="qlora", options={"lora_alpa": 3})(torch.randn(4, 37))
    assert type(caught.value).__name__ == "UnknownOptionError"


def test_a_mode_is_refused() -> None:
    compiled = torch.compile(torch.nn.Linear(7, 5), backend="qlora", mode="max-autotune")
    with pytest.raises(ConfigError, match="knows no mode 'max-autotune'"):
        compiled(torch.randn(3, 7))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": -1}, ConfigError, "r must be a rank of 0"),
        ({"r": 54}, ConfigError, r"r=54 is larger than both dimensions of up \(53 x 37\)"),
        ({"target_modules": ["q_proj"]}, NoTargetError, r"No linear layer of MLP matches .*up \(.*down \("),
        ({"exclude_modules": ".*"}, NoTargetError, "No linear layer of MLP matches"),
    ],
    ids=["negative rank", "huge rank", "no target", "all excluded"],
)
def test_wrong_options_are_our_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = MLP()
    with pytest.raises(error, match=words):
        compile_model(model, **options)(torch.randn(4, 37))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = MLP()
    with torch.no_grad():
        model.down.weight[3, 5] = float("nan")
    with pytest.raises(InvalidWeightError, match="down: The weight holds NaN or infinity"):
        compile_model(model)(torch.randn(4, 37))


def test_options_that_contradict_a_prepared_model() -> None:
    model = qc.prepare(MLP(), AOT_FP32)
    with pytest.raises(ModelStateError, match=r"already prepared with r=3 .* 4"):
        torch.compile(model, backend="qlora", options={"r": 4})(torch.randn(4, 37))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qlora", options={"lowering": "eager", "activation_budget": 0.5, "r": 3})
    torch.testing.assert_close(compiled(torch.ones(4, 37)), model(torch.ones(4, 37)), **TIGHT)
    config = prepared_config(model)
    assert config is not None
    assert config.lowering == "aot_eager"


def test_a_model_on_several_devices() -> None:
    model = MLP()
    model.down.to("meta")
    with pytest.raises(ModelStateError, match="The model is on several devices"):
        qc.prepare(model, AOT_FP32)


# --- Inductor ---


def test_inductor_compiles_forward_and_backward(tiny_llama: Llama) -> None:
    """The one test here that compiles for real: 10 to 30 s."""
    model, tokens = tiny_llama(num_hidden_layers=1), random_tokens(2, 7)
    compiled = compile_model(model, lowering="inductor")
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    take_grads(model)
    fill(model)
    out = compiled(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = take_grads(model)
    expected = model(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, **TIGHT)
    for mine, theirs in zip(grads, take_grads(model), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


CACHED = """
    import torch
    from torch import nn
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 53), nn.SiLU(), nn.Linear(53, 21))
    compiled = torch.compile(model, backend="qlora", options={"block_size": 32, "r": 3})
    x = torch.randn(4, 37)
    compiled(x).square().mean().backward()
    aot = counters["aot_autograd"]
    print(aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"])
"""


@pytest.mark.slow
def test_a_second_process_is_served_from_the_compile_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    command = [sys.executable, "-c", textwrap.dedent(CACHED)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert runs == [["0", "1", "0"], ["1", "0", "0"]]
