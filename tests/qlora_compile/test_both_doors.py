"""Both doors, `prepare` and the backend, and every way to call a model leave the same state and compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from toy_models import BLOCKS, FP32, TOKENS, Block, Language, fill, same_state, seeded

from qlora_compile import QLoRAConfig, prepare
from qlora_compile.errors import ModelStateError
from qlora_compile.modules import adapter_parameters, adapter_sites, prepared_config

EAGER = FP32 | {"lowering": "eager"}
AOT_EAGER = {"lowering": "aot_eager"}


class Spellings(nn.Module):
    """Linears that are not modules: F.linear, x @ w.T, x @ w with w [in, out], and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(22, 13) / 4)
        self.second = nn.Parameter(torch.randn(7, 22) / 4)
        self.third = nn.Parameter(torch.randn(7, 19) / 4)
        self.fourth = nn.Parameter(torch.randn(19, 5) / 4)
        self.bias = nn.Parameter(torch.randn(5))
        self.proj = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.first))
        x = torch.tanh(x @ self.second.T)
        x = torch.tanh(x @ self.third)
        return self.proj(torch.addmm(self.bias, x, self.fourth))


def spelled() -> tuple[nn.Module, Tensor]:
    return seeded(Spellings), torch.randn(4, 13, generator=torch.Generator().manual_seed(1))


def language() -> tuple[nn.Module, Tensor]:
    return seeded(Language), TOKENS


def tiny_gpt2() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=3, vocab_size=41, n_positions=32, use_cache=False, resid_pdrop=0, attn_pdrop=0,
        embd_pdrop=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = seeded(lambda: transformers.GPT2LMHeadModel(config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # transformers starts biases at zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model, TOKENS


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


@pytest.mark.parametrize("make", [spelled, language, tiny_gpt2])
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": False, "seed": 9, "block_size": 64}])
def test_all_doors_leave_bit_identical_state(make: Callable[[], Any], options: dict[str, Any]):
    models = []
    for door in ("example_inputs", "backend", "prepare"):
        model, x = make()
        if door == "backend":
            torch.compile(model, backend="qlora", options=EAGER | options)(x)
        elif make is not spelled or door == "example_inputs":
            prepare(model, FP32 | options, example_inputs=(x,) if door == "example_inputs" else None)
        else:
            continue  # without inputs it cannot see linears that are not modules
        models.append(model)
    assert len(adapter_sites(models[0])) >= 4
    assert all(same_state(models[0], other) for other in models[1:])


@pytest.mark.parametrize("make", [spelled, language, tiny_gpt2])
@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_eager_and_compiled_agree_with_the_dense_model_that_the_state_stands_for(
    make: Callable[[], Any], lowering: str
):
    (model, x), (dense, _) = make(), make()
    prepare(model, FP32, example_inputs=(x,))
    fill(model)
    for name, site in adapter_sites(model).items():
        delta = site.scaling() * site.b() @ site.a()
        owner, _, key = name.rpartition(".")
        module = dense.get_submodule(name) if site.param_name == "weight" else dense.get_submodule(owner)
        weight = module._parameters["weight" if site.param_name == "weight" else key]
        weight.data = (site.weight.dequantize() + (delta.t() if site.fan_in_fan_out else delta)).detach()
    compiled = torch.compile(model, backend="qlora", options={"lowering": lowering}, fullgraph=True)
    expected = logits(dense(x)).detach()
    share = 1e-5 * float(expected.abs().max())  # fp32, six layers deep, sums of at most 96 terms in another order
    grads = []
    for call in (compiled, model):
        model.zero_grad()
        y = logits(call(x))
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=share)
        y.square().mean().backward()
        grads.append([p.grad for p in adapter_parameters(model)])
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=2e-5 * float(eager.abs().max()))  # as above, twice as deep


class Breaks(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.q_proj(x)
        torch._dynamo.graph_break()
        return self.norm(x + self.out_proj(torch.tanh(hidden)))


class Straight(Language):
    """A break before the first linear, so that the first graph holds the embedding alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = 2 * self.embed(tokens)
        torch._dynamo.graph_break()
        return self.lm_head(self.layers[1](self.layers[0](x)))


def broken(kind: type[Language]) -> nn.Module:
    model = seeded(kind)
    for layer in model.layers:
        layer.__class__ = Breaks
    return model


@pytest.mark.parametrize("kind", [Language, Straight])
@pytest.mark.parametrize("call", ["torch.compile", "Module.compile", "example_inputs"])
def test_graph_breaks_inside_submodules_change_nothing(kind: type[Language], call: str):
    """Dynamo then traces the submodules' forwards by themselves; names, seeds and the head are still the model's."""
    model = broken(kind)
    if call == "example_inputs":
        prepare(model, FP32, example_inputs=(TOKENS,))
        compiled = model
    elif call == "torch.compile":
        compiled = torch.compile(model, backend="qlora", options=EAGER)
    else:
        model.compile(backend="qlora", options=EAGER)
        compiled = model
    compiled(TOKENS)
    assert same_state(model, prepare(broken(kind), FP32))
    fill(model)
    y = compiled(TOKENS)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(y, compiled(TOKENS), rtol=1e-5, atol=1e-5)  # fp32 products in another order
    y.sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("door", ["prepare", "example_inputs", "backend"])
def test_a_model_that_was_first_used_without_gradients_trains(door: str, mode: Callable[[], Any]):
    model = seeded(Language)
    compiled = torch.compile(model, backend="qlora", options=None if door != "backend" else FP32 | AOT_EAGER)
    with mode():
        if door == "backend":
            compiled(TOKENS)
        else:
            prepare(model, FP32 | AOT_EAGER, example_inputs=(TOKENS,) if door == "example_inputs" else None)
    fill(model)
    for call in (compiled, model):
        model.zero_grad()
        with mode():
            expected = call(TOKENS)
        y = call(TOKENS)
        y.sum().backward()
        torch.testing.assert_close(y.detach(), expected.clone(), rtol=1e-5, atol=1e-5)  # fp32 products
        assert all(p.grad is not None for p in adapter_parameters(model))


class Checkpointed(Language):
    """Activation checkpointing: Dynamo puts each layer into a subgraph of its own."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return self.lm_head(x)


@pytest.mark.parametrize("prepared", [True, False])
def test_activation_checkpointing(prepared: bool):
    model, options = seeded(Checkpointed), FP32 | AOT_EAGER
    if prepared:
        prepare(model, options)
    compiled = torch.compile(model, backend="qlora", options=None if prepared else options, fullgraph=True)
    compiled(TOKENS)
    assert list(adapter_sites(model)) == BLOCKS
    fill(model)
    grads = []
    for call in (compiled, model):
        model.zero_grad()
        call(TOKENS).square().sum().backward()
        grads.append([p.grad for p in adapter_parameters(model)])
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=2e-5 * float(eager.abs().max()))  # fp32, 4 layers deep


@pytest.mark.parametrize("prepared", [True, False])
def test_layers_that_are_compiled_by_themselves(prepared: bool):
    model = Language()
    if prepared:
        prepare(model, EAGER)
    for layer in model.layers:
        layer.compile(backend="qlora", options={} if prepared else EAGER)
    model(TOKENS)
    assert list(adapter_sites(model)) == BLOCKS and len(adapter_parameters(model)) == 8
    assert prepared_config(model.layers[1]) == prepared_config(model) == QLoRAConfig.from_options(EAGER)


def test_linears_that_are_not_modules_are_found_with_example_inputs():
    model, x = spelled()
    prepare(model, FP32, example_inputs=(x,))
    sites = adapter_sites(model)
    assert set(sites) == {"first", "second", "third", "fourth", "proj"}
    assert {name: site.fan_in_fan_out for name, site in sites.items()} == {
        "first": False, "second": False, "third": True, "fourth": True, "proj": False
    }  # fmt: skip
    assert sites["third"].a().shape == (3, 7) and sites["third"].b().shape == (19, 3)
    assert type(model).__name__ == "Spellings" and isinstance(model, Spellings)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}_lora_{part}.default" for name in ("first", "second", "third", "fourth") for part in "AB"
    } | {"proj.lora_A.default", "proj.lora_B.default"}


@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_example_inputs_in_every_form(inputs: Callable[[Tensor], Any]):
    model, x = spelled()
    assert len(adapter_sites(prepare(model, FP32, example_inputs=inputs(x)))) == 5


def test_example_inputs_run_no_compiler_and_change_no_running_state():
    model = nn.Sequential(nn.Linear(13, 22), nn.BatchNorm1d(22), nn.Linear(22, 7))
    prepare(model, FP32, example_inputs=(torch.randn(4, 13),))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert list(adapter_sites(model)) == ["0", "2"]


def test_example_inputs_with_a_wrong_name_are_refused():
    model, x = spelled()
    with pytest.raises(ModelStateError, match=r"names 'y', which Spellings\.forward lacks"):
        prepare(model, FP32, example_inputs={"y": x})
    assert prepared_config(model) is None
