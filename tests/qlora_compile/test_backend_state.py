"""What compiling leaves behind: the state of both doors, memory, what trains."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import (
    AOT_FP32,
    MLP,
    TIGHT,
    Llama,
    RawParameters,
    compile_model,
    fill,
    graphs_compiled,
    random_tokens,
    same_as_eager,
    same_state,
    take_grads,
)

import qlora_compile as qc
from qlora_compile.modules import QLoRALinear, adapter_parameters, adapter_sites

# --- state: both doors, memory, what trains ---


def test_both_doors_leave_bit_identical_state(tiny_llama: Llama) -> None:
    by_call, by_prepare = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    compile_model(by_call, seed=7)(input_ids=random_tokens(2, 7))
    qc.prepare(by_prepare, AOT_FP32 | {"seed": 7})
    assert same_state(by_call, by_prepare)
    assert [p.requires_grad for p in by_call.parameters()] == [p.requires_grad for p in by_prepare.parameters()]
    other = qc.prepare(tiny_llama(num_hidden_layers=1), AOT_FP32 | {"seed": 8})
    assert not torch.equal(adapter_parameters(by_call)[0], adapter_parameters(other)[0])


def test_both_doors_for_parameters_that_are_no_modules() -> None:
    torch.manual_seed(1)
    by_call = RawParameters()
    torch.manual_seed(1)
    by_prepare = RawParameters()
    compile_model(by_call)(torch.randn(4, 37))
    qc.prepare(by_prepare, AOT_FP32, example_inputs=(torch.randn(4, 37),))
    assert list(adapter_sites(by_prepare)) == ["w", "v"]
    assert same_state(by_call, by_prepare)


def test_dense_weights_are_freed(tiny_llama: Llama) -> None:
    model, tokens = tiny_llama(num_hidden_layers=1), random_tokens(2, 7)
    weights = {name: module.weight for name, module in model.named_modules() if type(module) is nn.Linear}
    del weights["lm_head"]
    parameters = {name: weakref.ref(weight) for name, weight in weights.items()}
    storages = {name: weakref.ref(weight.untyped_storage()) for name, weight in weights.items()}
    del weights
    compiled = compile_model(model)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    gc.collect()
    assert len(parameters) == 7
    assert [name for name, ref in parameters.items() if ref() is not None] == []
    assert [name for name, ref in storages.items() if ref() is not None] == []


def test_dense_weights_that_somebody_holds_do_not_hinder() -> None:
    """An optimizer made before the first call holds every dense weight: it trains nothing, and breaks nothing."""
    model, x = MLP(), torch.randn(4, 37)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = compile_model(model)
    assert graphs_compiled(lambda: compiled(x)) == 1
    assert graphs_compiled(lambda: compiled(x)) == 0
    before = compiled(x)
    before.sum().backward()
    optimizer.step()
    torch.testing.assert_close(compiled(x), before, atol=0, rtol=0)


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_nothing_dense_is_saved_for_backward(lowering: str) -> None:
    model, x = MLP(), torch.randn(4, 37, requires_grad=True)
    compiled = compile_model(model, lowering=lowering)
    compiled(x)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = compiled(x)
    weights = {site.weight.numel() for site in adapter_sites(model).values()}
    assert weights == {37 * 53, 53 * 21}
    assert any(t.dtype == torch.uint8 for t in saved)  # the codes are
    assert [tuple(t.shape) for t in saved if t.numel() in weights and t.is_floating_point()] == []
    out.sum().backward()
    assert x.grad is not None


def test_only_adapters_train() -> None:
    model = MLP()
    assert all(param.requires_grad for param in model.parameters())
    compiled = compile_model(model)
    compiled(torch.randn(4, 37)).sum().backward()
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trained == [f"{layer}.lora_{part}.default" for layer in ("up", "down") for part in "AB"]
    assert [name for name, param in model.named_parameters() if param.grad is not None] == trained


def test_frozen_weights_are_targets_too() -> None:
    model = MLP().requires_grad_(False)
    compiled = compile_model(model)
    compiled(torch.randn(4, 37)).sum().backward()
    assert len(take_grads(model)) == 4


def test_modules_to_save_train_in_full(tiny_llama: Llama) -> None:
    model, tokens = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False), random_tokens(2, 7)
    compiled = compile_model(model, modules_to_save=("lm_head", "norm"))
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    full = [name for name, param in model.named_parameters() if param.requires_grad and "lora" not in name]
    assert full == ["model.norm.weight", "lm_head.weight"]
    grads = [model.get_parameter(name).grad for name in full]
    model.zero_grad()
    fill(model)
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    mine = [model.get_parameter(name).grad for name in full]
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for grad, name in zip(mine, full, strict=True):
        torch.testing.assert_close(grad, model.get_parameter(name).grad, **TIGHT)
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_training_with_an_optimizer_lowers_the_loss() -> None:
    model = qc.prepare(MLP(), AOT_FP32 | {"r": 8})
    compiled = torch.compile(model, backend="qlora", fullgraph=True)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    x, target = torch.randn(16, 37), torch.randn(16, 21)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(compiled(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_output_head_and_tied_embeddings_stay_dense(tiny_llama: Llama) -> None:
    tied, untied = (tiny_llama(num_hidden_layers=1, tie_word_embeddings=tie) for tie in (True, False))
    compile_model(tied)(input_ids=random_tokens(2, 7))
    qc.prepare(untied, AOT_FP32)
    for model in (tied, untied):
        assert type(model.lm_head) is nn.Linear
        assert type(model.lm_head.weight) is nn.Parameter
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (model is tied)
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    compile_model(model, exclude_modules=())(input_ids=random_tokens(2, 7))
    assert isinstance(model.lm_head, QLoRALinear)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj": 3, "v_proj": 3}),
        ({"target_modules": r".*\.mlp\..*", "exclude_modules": ["up_proj"]}, {"gate_proj": 3, "down_proj": 3}),
        ({"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 5}}, {"q_proj": 3, "k_proj": 5}),
        ({"target_modules": ["q_proj", "k_proj"], "r": 0}, {"q_proj": None, "k_proj": None}),
    ],
    ids=["list", "regex and exclude", "rank_pattern", "r=0"],
)
def test_targets_and_ranks(tiny_llama: Llama, options: dict[str, Any], expected: dict[str, int | None]) -> None:
    model, tokens = tiny_llama(num_hidden_layers=1), random_tokens(2, 7)
    compiled = compile_model(model, **options)
    compiled(input_ids=tokens)
    found = {
        name.rsplit(".", 1)[-1]: site.rank() if site.adapters else None for name, site in adapter_sites(model).items()
    }
    assert found == expected
    fill(model)
    torch.testing.assert_close(compiled(input_ids=tokens).logits, model(input_ids=tokens).logits, **TIGHT)


# --- what the caller decides after the edits ---


@pytest.mark.parametrize("door", ["plain", "prepared"])
def test_what_is_set_to_train_after_the_edits_trains(tiny_llama: Llama, door: str) -> None:
    model, tokens = tiny_llama(num_hidden_layers=1), random_tokens(2, 7)
    if door == "prepared":
        qc.prepare(model, AOT_FP32)
    compiled = compile_model(model)
    if door == "plain":
        compiled(input_ids=tokens)
    fill(model)
    norm, embedding = model.model.norm.weight, model.model.embed_tokens.weight
    assert not norm.requires_grad
    norm.requires_grad_(True)
    grads = []
    for call in (compiled, model):
        call(input_ids=tokens, labels=tokens).loss.backward()
        assert norm.grad is not None and embedding.grad is None
        grads.append([norm.grad.clone(), *take_grads(model)])
        model.zero_grad()
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, **TIGHT)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_4_bit_weight_does_not_train_whatever_is_asked(compiled: bool) -> None:
    model, x = MLP(), torch.randn(5, 37)
    qc.prepare(model, AOT_FP32)
    model.requires_grad_(True)
    stored = [param for param in model.parameters() if isinstance(param, qc.QuantizedTensor)]
    assert len(stored) == 2 and not any(param.requires_grad for param in stored)
    (compile_model(model) if compiled else model)(x).sum().backward()
    assert all(param.grad is None for param in stored) and model.up.bias.grad is not None


class Scaled(nn.Module):
    """Its forward reads an attribute of its class."""

    gain = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(37, 53) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) * self.gain


class ScaledLinear(nn.Linear):
    gain = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def hooked(before: bool) -> nn.Module:
    linear = nn.Linear(53, 37)
    if before:
        linear.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    else:
        linear.register_forward_hook(lambda module, args, out: out * 1.5)
    return linear


@pytest.mark.parametrize(
    "make",
    [Scaled, lambda: ScaledLinear(53, 37), lambda: hooked(True), lambda: hooked(False)],
    ids=["attribute", "subclass", "pre-hook", "hook"],
)
def test_guards_on_a_class_that_gives_way_to_ours(make: Any) -> None:
    """Dynamo builds them after the edits, when the class is another."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(21, 53), make(), nn.Linear(37, 21)), torch.randn(5, 21)
    compiled = compile_model(model)
    compiled(x).sum().backward()
    model.zero_grad()
    fill(model)
    assert graphs_compiled(lambda: same_as_eager(model, compiled, x)) == 0
