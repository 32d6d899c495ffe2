"""Models whose equal layers are outlined, through AOTAutograd: the numbers, gradients, memory and graphs of the flat one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import AOT_FP32, TIGHT, Llama, fill, graphs_compiled, take_grads

import qlora_compile as qc
from qlora_compile import regions
from qlora_compile.modules import adapter_parameters


class Block(nn.Module):
    """up [53, 37] with bias, down [37, 53], around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(37), nn.Linear(37, 53), nn.Linear(53, 37, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Equal blocks; `between(i, x)` may do something after each."""

    def __init__(self, count: int, between: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Block() for _ in range(count)), between

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) if self.between is None else self.between(i, block(x))
        return x


def _compile(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="qlora", fullgraph=True, options=AOT_FP32 | {"outline_layers": True} | options)


def _calls(model: nn.Module) -> int:
    """Calls of outlined regions in the model's (largest) graph."""
    return sum(record.target == "call_region" for record in qc.explain(model).stages["outline_layers"])


def _step(model: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """A second step (the first makes the adapters): loss, then the adapters' gradients."""
    compiled(*args, **kwargs)
    fill(model)
    torch.manual_seed(5)
    out = compiled(*args, **kwargs)
    loss = out.loss if hasattr(out, "loss") else out.square().mean()
    loss.backward()
    return [loss.detach(), *take_grads(model)]


def _flat_and_outlined(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Tensor], nn.Module]:
    """The same step of two copies of the model, and the outlined copy."""
    options = kwargs.pop("options", {})
    outlined = copy.deepcopy(model)
    flat = _step(model, _compile(model, **options, outline_layers=False), *args, **kwargs)
    torch._dynamo.reset()
    return flat, _step(outlined, _compile(outlined, **options), *args, **kwargs), outlined


# --- numbers ---


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_llama_equals_the_flat_graph_to_the_bit(tiny_llama: Llama, lowering: str, dropout: float) -> None:
    """The same kernels run in the same order, with the same seeds drawn for dropout. SmolLM2's shape: one graph."""
    model, tokens = tiny_llama(num_hidden_layers=4).train(), torch.randint(3, 211, (2, 7))
    options = {"lowering": lowering, "lora_dropout": dropout}
    flat, outlined, copied = _flat_and_outlined(model, input_ids=tokens, labels=tokens, options=options)
    assert _calls(model) == 0
    assert _calls(copied) == 4
    assert len(outlined) == 1 + 4 * 7 * 2
    for old, new in zip(flat, outlined, strict=True):
        assert old.abs().max() > 0
        assert torch.equal(old, new)


def test_layers_drop_different_elements() -> None:
    """Two layers with the same weights and adapters on the same x: only their masks can differ."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([block(x) for block in self.blocks])

    model, x = Twice(), torch.randn(4, 37)
    model.blocks[1].load_state_dict(model.blocks[0].state_dict())
    compiled = _compile(model, lora_dropout=0.5)
    compiled(x)
    assert _calls(model) == 2
    fill(model)
    first, second = model.blocks
    with torch.no_grad():
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            if mine.requires_grad:
                theirs.copy_(mine)
    a, b = compiled(x)
    assert not torch.equal(a, b)
    again = compiled(x)
    assert not torch.equal(a, again[0])
    model.eval()
    a, b = compiled(x)
    assert torch.equal(a, b)


def test_an_input_that_needs_no_gradient_is_not_mistaken_for_one_that_does() -> None:
    """torch keeps one trace for all calls of one name. Here the calls differ in what needs a gradient: x of the first
    does not, nor that of the third. The trace of one would lose the gradients of another."""
    model, x = Stack(4, lambda i, h: h.detach() if i == 1 else h), torch.randn(4, 37)
    compiled = _compile(model)
    compiled(x)
    fill(model)
    compiled(x).square().mean().backward()
    expected = [param.grad for param in adapter_parameters(model)]
    for param in adapter_parameters(model):
        param.grad = None
    model(x).square().mean().backward()
    for mine, param in zip(expected, adapter_parameters(model), strict=True):
        assert (mine is None) == (param.grad is None)
        if mine is not None:
            torch.testing.assert_close(mine, param.grad, **TIGHT)
    assert sum(mine is not None for mine in expected) == 2 * 2 * 2


@pytest.mark.parametrize("mode", ["training", "evaluation", "nothing trains"])
def test_all_layers_share_one_trace_though_the_first_gets_no_gradient_to_pass_on(
    tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The embedding is frozen. Gradients are compared with the flat graph's in the first test of this file."""
    kinds = set()
    original = regions._kind

    def kind(operands: tuple[Any, ...]) -> str:
        kinds.add(original(operands))
        return original(operands)

    monkeypatch.setattr(regions, "_kind", kind)
    model, tokens = tiny_llama(num_hidden_layers=4).train(mode == "training"), torch.randint(3, 211, (2, 7))
    compiled = _compile(model, r=0 if mode == "nothing trains" else 3)
    with torch.set_grad_enabled(mode != "evaluation"):
        out = compiled(input_ids=tokens, labels=tokens)
    assert _calls(model) == 4
    assert out.loss.requires_grad == (mode == "training")
    assert len(kinds) == 1


def test_inputs_of_other_strides_are_not_mistaken_for_each_other() -> None:
    """The third layer gets a transposed x: a subgraph lowered for contiguous rows would read the wrong elements."""
    model = Stack(4, lambda i, h: h.transpose(0, 1).contiguous().transpose(0, 1) if i == 1 else h)
    x = torch.randn(4, 6, 37, requires_grad=True)
    compiled = _compile(model)
    compiled(x)
    fill(model)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected, **TIGHT)
    for mine, theirs in zip(*(torch.autograd.grad(y.square().mean(), x) for y in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_a_prepared_model_is_outlined_too(tiny_llama: Llama) -> None:
    model, tokens = tiny_llama(num_hidden_layers=3), torch.randint(3, 211, (2, 7))
    qc.prepare(model, AOT_FP32)
    compiled = torch.compile(model, backend="qlora", fullgraph=True, options={"outline_layers": True})
    mine = _step(model, compiled, input_ids=tokens, labels=tokens)
    assert _calls(model) == 3
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for new, old in zip(mine, [loss.detach(), *take_grads(model)], strict=True):
        torch.testing.assert_close(new, old, **TIGHT)


# --- graphs and modes ---


def test_training_evaluation_and_no_grad_each_compile_once() -> None:
    model, x = Stack(3), torch.randn(4, 37)
    compiled = _compile(model, lora_dropout=0.25)

    def no_grad() -> Tensor:
        with torch.no_grad():
            out: Tensor = compiled(x)
        return out

    assert graphs_compiled(lambda: compiled(x)) == 1
    model.eval()
    assert graphs_compiled(lambda: (compiled(x), no_grad())) == 2
    model.train()
    assert graphs_compiled(lambda: compiled(x)) == 0
    model.eval()
    fill(model)
    torch.testing.assert_close(no_grad(), model(x), **TIGHT)
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)


# --- memory ---


def _saved(model: nn.Module, **options: Any) -> list[Tensor]:
    """What the compiled graph keeps for backward."""
    compiled, x = _compile(model, **options), torch.randn(4, 37, requires_grad=True)
    compiled(x)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = compiled(x)
    out.sum().backward()
    assert x.grad is not None
    return saved


def test_nothing_dense_is_saved_for_backward_and_no_more_than_flat() -> None:
    model = Stack(4)
    flat = _saved(copy.deepcopy(model), outline_layers=False)
    torch._dynamo.reset()
    outlined = _saved(model)
    assert any(t.dtype == torch.uint8 for t in outlined)  # the codes are
    assert [t.shape for t in outlined if t.numel() == 37 * 53 and t.is_floating_point()] == []
    count = [sum(t.numel() * t.element_size() for t in _distinct(tensors)) for tensors in (flat, outlined)]
    assert count[1] <= count[0] * 1.05


@pytest.mark.slow
def test_the_activation_budget_holds_inside_regions() -> None:
    """Each layer is partitioned by the same min-cut, so the fraction holds for it."""
    model = Stack(4)
    everything = _saved(copy.deepcopy(model), lowering="inductor")
    torch._dynamo.reset()
    least = _saved(model, lowering="inductor", activation_budget=0.0)
    kept = [
        sum(t.numel() for t in tensors if t.dtype == torch.float32 and t.shape[:1] == (4,))
        for tensors in (everything, least)
    ]
    assert kept[1] < 0.7 * kept[0]


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


# --- Inductor ---


def test_inductor_compiles_one_layer_for_all(tiny_llama: Llama) -> None:
    model, tokens = tiny_llama(num_hidden_layers=3), torch.randint(3, 211, (2, 7))
    compiled = _compile(model, lowering="inductor")
    mine = _step(model, compiled, input_ids=tokens, labels=tokens)
    assert _calls(model) == 3
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for new, old in zip(mine, [loss.detach(), *take_grads(model)], strict=True):
        torch.testing.assert_close(new, old, **TIGHT)
