"""Models whose class names no loss: the one that transformers falls back to, within the one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_models import AOT_FP32, TIGHT, graphs_compiled, random_tokens

import qlora_compile as qc
from qlora_compile.transformers_loss import FALLBACK, name_losses

transformers = pytest.importorskip("transformers")

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False, "vocab_size": 211}
DENSE = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
GPT = {
    "n_embd": 36,
    "n_layer": 1,
    "n_head": 3,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT | {"n_inner": 80},
    "openai-gpt": GPT,
    "bert": DENSE | {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def build(name: str) -> Any:
    config = transformers.AutoConfig.for_model(name, **SPECIAL, **MODELS[name])
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("name", MODELS)
def test_the_name_is_of_the_loss_that_transformers_takes(name: str) -> None:
    model = build(name)
    assert model.loss_type is None
    before = model.loss_function
    assert name_losses(model)
    assert model.loss_type == FALLBACK
    assert model.loss_function is before
    assert not name_losses(model)


def test_a_loss_of_ones_own_and_a_model_without_one_are_left() -> None:
    model = build("gpt2")
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    assert not name_losses(model)
    assert model.loss_type is None
    assert not name_losses(build("gpt2").transformer)
    assert not name_losses(nn.Linear(3, 5))


@pytest.mark.parametrize("door", ["prepare", "compile", "PEFT's wrapper"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_one_graph_without_logits_and_the_numbers_of_eager(name: str, door: str) -> None:
    model, tokens = build(name), random_tokens(2, 7)
    options = AOT_FP32 | {"keep_logits": False}
    if door == "prepare":
        qc.prepare(model, options)
    elif door == "PEFT's wrapper":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj", "query", "dense"]))
    compiled = torch.compile(model, backend="qlora", options=options)
    assert graphs_compiled(lambda: compiled(input_ids=tokens, labels=tokens)) == 1
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.3)  # B is zero at first, and would hide half of the formula
    out = compiled(input_ids=tokens, labels=tokens)
    assert out.logits is None
    grads = torch.autograd.grad(out.loss, trained)
    expected = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(out.loss, expected.loss, **TIGHT)
    for mine, theirs in zip(grads, torch.autograd.grad(expected.loss, trained), strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_example_inputs_without_labels_are_no_step(recwarn: pytest.WarningsRecorder) -> None:
    qc.prepare(build("gpt2"), AOT_FP32 | {"keep_logits": False}, {"input_ids": random_tokens(2, 7)})
    assert not [warning for warning in recwarn if "keep_logits" in str(warning.message)]
