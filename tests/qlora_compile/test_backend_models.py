"""Spellings and shapes of models: parameters without modules, graph breaks, functions, copies, wrappers, PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import (
    AOT_FP32,
    MLP,
    TIGHT,
    RawParameters,
    compile_model,
    fill,
    graphs_compiled,
    same_as_eager,
    same_state,
    take_grads,
)

import qlora_compile as qc
from qlora_compile.modules import QLoRALinear, adapter_parameters, adapter_sites

# --- spellings and shapes of models ---


def test_raw_parameters_keep_their_numbers_over_retraces() -> None:
    model = RawParameters()
    compiled = compile_model(model)
    compiled(torch.randn(2, 5, 37))
    fill(model)
    for shape in [(2, 5, 37), (3, 4, 37), (7, 37), (2, 9, 37)]:
        same_as_eager(model, compiled, torch.randn(shape))
    report = qc.explain(model)
    assert report.graphs > 1
    rewrites = {p.name: p.rewrites for p in report.passes}
    assert rewrites["match_lora"] == 2  # a retrace reads W + B A
    assert rewrites["fuse_lora_linear"] == 2


class Piecewise(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        torch._dynamo.graph_break()
        return self.down(F.silu(h))


def test_graph_breaks_leave_pieces_with_one_set_of_adapters() -> None:
    torch.manual_seed(1)
    model = Piecewise()
    compiled = torch.compile(model, backend="qlora", options=AOT_FP32)
    x = torch.randn(4, 37)
    assert graphs_compiled(lambda: compiled(x)) >= 2
    assert list(adapter_sites(model)) == ["up", "down"]
    torch.manual_seed(1)
    assert same_state(model, qc.prepare(MLP(), AOT_FP32))
    fill(model)
    same_as_eager(model, compiled, x)
    assert graphs_compiled(lambda: compiled(x)) == 0


def test_a_function_of_tensors_is_compiled_as_it_is() -> None:
    compiled = torch.compile(lambda x: (x @ x.T).sin(), backend="qlora", options=AOT_FP32)
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), (x @ x.T).sin(), **TIGHT)


@pytest.mark.parametrize("as_argument", [True, False])
def test_a_function_that_calls_a_model(as_argument: bool) -> None:
    model, x = MLP(), torch.randn(4, 37)
    compiled = torch.compile(
        (lambda m, x: m(x).square().mean()) if as_argument else (lambda _, x: model(x).square().mean()),
        backend="qlora",
        fullgraph=True,
        options=AOT_FP32,
    )
    compiled(model, x)
    assert isinstance(model.up, QLoRALinear)
    assert list(adapter_sites(model)) == ["up", "down"]
    fill(model)
    compiled(model, x).backward()
    grads = take_grads(model)
    model(x).square().mean().backward()
    for mine, theirs in zip(grads, take_grads(model), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_a_model_without_linears_is_compiled_as_it_is() -> None:
    model, x = nn.Sequential(nn.LayerNorm(5), nn.GELU()), torch.randn(3, 5)
    torch.testing.assert_close(compile_model(model)(x), model(x), **TIGHT)


class Indexed(nn.Module):
    """A ModuleList by index and a ModuleDict by name, one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(37, 53), nn.Linear(53, 37, bias=False)])
        self.named = nn.ModuleDict({"out": nn.Linear(37, 21)})

    def forward(self, x: Tensor) -> Tensor:
        for index in (0, 1, 0, 1):
            x = self.layers[index](x).tanh()
        return self.named["out"](x)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Sequential(nn.Linear(37, 53), nn.SiLU(), nn.Linear(53, 21)), ["0", "2"]),
        (lambda: nn.Linear(37, 21), [""]),
        (Indexed, ["layers.0", "layers.1", "named.out"]),
        (lambda: nn.Sequential(nn.Linear(37, 53), nn.ReLU(inplace=True), nn.Linear(53, 21)), ["0", "2"]),
    ],
    ids=["Sequential", "the model is a linear", "ModuleList, called twice", "activation in place"],
)
@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_shapes_of_models(make: Callable[[], nn.Module], names: list[str], lowering: str) -> None:
    model = make()
    compiled = compile_model(model, lowering=lowering)
    compiled(torch.randn(4, 37))
    assert list(adapter_sites(model)) == names
    assert len(adapter_parameters(model)) == 2 * len(names)
    fill(model)
    same_as_eager(model, compiled, torch.randn(4, 37))


class WritesInPlace(MLP):
    """Calls whose results nobody uses: dropping one as dead code would change the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4, 53))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.steps += 1
        h[0] = 0.5
        F.relu(h, inplace=True)
        torch.mul(h.detach(), 2, out=self.last)
        return self.down(h)


def test_calls_for_their_side_effects_stay() -> None:
    model, x = WritesInPlace(), torch.randn(4, 37)
    compiled = compile_model(model)
    out = compiled(x)
    last = model.last.clone()
    assert model.steps == 1
    torch.testing.assert_close(out, model(x), **TIGHT)
    torch.testing.assert_close(last, model.last, **TIGHT)


def test_a_copy_of_a_compiled_model_stands_alone() -> None:
    model, x = MLP(), torch.randn(4, 37)
    compiled = compile_model(model)
    compiled(x)
    fill(model)
    copied = copy.deepcopy(model)
    compiled_copy = torch.compile(copied, backend="qlora")
    torch.testing.assert_close(compiled_copy(x), model(x), **TIGHT)
    with torch.no_grad():
        adapter_parameters(copied)[1].zero_()
    torch.testing.assert_close(compiled_copy(x), copied(x), **TIGHT)
    assert (compiled_copy(x) - compiled(x)).abs().max() > 0.01
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)


def test_an_optimized_model_in_a_wrapper_is_found() -> None:
    """`nn.Sequential(model)`, as many trainers wrap: names get a prefix, the weights are quantized once."""
    model, x = MLP(), torch.randn(4, 37)
    compiled = compile_model(nn.Sequential(model, nn.LayerNorm(21)))
    compiled(x)
    assert isinstance(model.up, QLoRALinear)
    assert list(adapter_sites(compiled._orig_mod)) == ["0.up", "0.down"]


def test_a_peft_model_keeps_its_base_and_its_adapters_are_fused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(MLP(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]))
    trained = [param for param in model.parameters() if param.requires_grad]
    with torch.no_grad():
        for param in trained:
            param.normal_(std=0.3)
    compiled, x = compile_model(model), torch.randn(4, 37)
    compiled(x).square().mean().backward()
    grads = [param.grad for param in trained]
    model.zero_grad()
    expected = model(x)
    expected.square().mean().backward()
    torch.testing.assert_close(compiled(x), expected, **TIGHT)
    for mine, param in zip(grads, trained, strict=True):
        torch.testing.assert_close(mine, param.grad, **TIGHT)
    assert {p.name: p.rewrites for p in qc.explain(model).passes}["fuse_lora_linear"] == 2


class Broken(nn.Module):
    """A layer that Dynamo cannot take into the graph of its caller: its code is compiled once for all layers like it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 0.1 * self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("prepared", [True, False])
def test_equal_layers_after_graph_breaks_have_weights_of_their_own(prepared: bool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(48, 48), *(Broken() for _ in range(4)))
    options = AOT_FP32 | {"init_lora_weights": False, "lora_alpha": 1}
    if prepared:
        qc.prepare(model, options)
    compiled = torch.compile(model, backend="qlora", options=None if prepared else options)
    x = torch.randn(5, 48)
    compiled(x)  # a plain model is changed by the first call
    # fp32 sums of 80 values of about 1 in another order
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
