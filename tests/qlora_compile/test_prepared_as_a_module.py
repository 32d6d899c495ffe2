"""A prepared model is a module like any other: moved, cast, copied, saved, hooked, and put into a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.modules import adapter_parameters

transformers = pytest.importorskip("transformers")
IDS = torch.arange(22).reshape(2, 11) * 7 % 211
OPTIONS = {"r": 3, "init_lora_weights": False, "compute_dtype": "float32", "lowering": "eager"}


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return qc.prepare(tiny_llama(num_hidden_layers=1), OPTIONS).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")])
def test_casts_keep_codes_and_numbers(model: Any, cast: Callable[[Any], Any]) -> None:
    before = logits(model)
    codes = {name: p.codes.clone() for name, p in model.named_parameters() if isinstance(p, qc.QuantizedTensor)}
    cast(model)
    assert codes and all(torch.equal(model.get_parameter(name).codes, code) for name, code in codes.items())
    # Half precision of activations and norms: two layers' worth of bfloat16's unit.
    assert (logits(model) - before).norm() < 2**-5 * before.norm()
    compiled = torch.compile(model, backend="qlora", options={"lowering": "eager"})
    assert (logits(compiled) - before).norm() < 2**-5 * before.norm()


def test_state_moves_to_another_prepared_model(model: Any, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = qc.prepare(tiny_llama(num_hidden_layers=1, seed=5), OPTIONS).eval()
    assert not torch.equal(logits(other), logits(model))
    with torch.no_grad():
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits(other), logits(model))


def test_a_copy_stands_alone(model: Any) -> None:
    before, twin = logits(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in adapter_parameters(twin):
            parameter.mul_(3)
    assert torch.equal(logits(model), before) and not torch.equal(logits(twin), before)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in twin.named_parameters()] and len(names) == len(set(names))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n in names if "lora_" in n}


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_see_inputs_outputs_and_gradients(model: Any, compiled: bool) -> None:
    seen: list[str] = []
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, output: output * 0)
    run = torch.compile(model, backend="qlora", options={"lowering": "eager"}) if compiled else model
    out = run(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert seen
    grads = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert all(value == 0 for name, value in grads.items() if ".mlp." in name)  # its output was zeroed
    assert any(value > 0 for name, value in grads.items() if ".self_attn." in name)


@pytest.mark.slow
def test_a_pipeline(tiny_checkpoint: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    qc.prepare(model, OPTIONS).eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    expected = pipe("the quick brown", **arguments)
    model.compile(backend="qlora")
    assert pipe("the quick brown", **arguments) == expected
    assert qc.explain(model).graphs > 0
