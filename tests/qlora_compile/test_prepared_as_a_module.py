"""A prepared model is a module like any other: moved, cast, copied, saved, hooked, and put into a pipeline."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import FP32, RawParameters, fill, seeded

import qlora_compile as qc
from qlora_compile.modules import adapter_parameters, adapter_sites

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


def test_another_process_loads_the_whole_model(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=4), OPTIONS).eval()  # four: marked as equal
    compiled = torch.compile(model, backend="qlora")
    torch.save(model, tmp_path / "model.pt")
    torch.save((compiled(input_ids=IDS).logits.detach(), logits(model)), tmp_path / "expected.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
compiled, eager = torch.load({str(tmp_path / "expected.pt")!r})
ids = torch.arange(22).reshape(2, 11) * 7 % 211
assert torch.equal(model(input_ids=ids).logits, eager)
assert torch.equal(torch.compile(model, backend="qlora")(input_ids=ids).logits, compiled)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_pickle_keeps_adapted_parameters() -> None:
    model, x = qc.prepare(seeded(RawParameters), FP32, example_inputs=(torch.randn(2, 37),)), torch.randn(3, 37)
    fill(model)
    twin = pickle.loads(pickle.dumps(model, protocol=0))
    assert type(twin) is type(model) and torch.equal(twin(x), model(x))
    assert list(adapter_sites(twin)) == ["w", "v"]


def test_pickle_keeps_experts() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 211}
    config = transformers.MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, **sizes)
    model = qc.prepare(transformers.MixtralForCausalLM(config), OPTIONS).eval()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), logits(model))
    assert list(adapter_sites(twin)) == list(adapter_sites(model))


def test_a_class_that_pickles_itself_is_refused() -> None:
    class Rebuilt(torch.nn.Linear):
        def __reduce__(self) -> Any:
            return Rebuilt, (self.in_features, self.out_features)

    model = torch.nn.Sequential(Rebuilt(8, 4))
    qc.prepare(model, OPTIONS)
    with pytest.raises(qc.errors.ModelStateError, match=r"Rebuilt says by itself how it is pickled .*save_adapter"):
        pickle.dumps(model)


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
