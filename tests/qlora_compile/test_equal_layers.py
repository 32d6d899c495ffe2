"""Equal layers that Dynamo traces once: the same numbers, all guards, and everything else traced in line."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile as qc
from qlora_compile import layer_tracing
from qlora_compile.equal_layers import ORIGINAL

pytestmark = pytest.mark.skipif(not layer_tracing.KNOWN, reason="this torch's Dynamo traces every layer by itself")
LAYERS = 4
OPTIONS = {"block_size": 32, "r": 3, "compute_dtype": "float32", "init_lora_weights": False}


class Layer(nn.Module):
    """A block with what a guard can stand on: a number, a mode, submodules, a tuple among the arguments."""

    def __init__(self, width: int = 18) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 37), nn.Linear(37, width)
        self.gain, self.times = 0.5, 2
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        h = torch.relu(self.up(self.norm(x) * pair[0] + pair[1]))
        if self.training:
            h = h * 1.25
        return x + self.gain * self.times * self.down(h)


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x, pair = x * 1.5, (torch.cos(x), torch.sin(x))
        for layer in self.layers:
            x = layer(x, pair=pair)
        return x


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    layer_tracing._refused.clear()


def compiled(model: nn.Module, *, in_line: bool = False) -> Any:
    """The prepared model compiled, its graph run as it is: the same bits as with every layer traced in line."""
    qc.prepare(model, OPTIONS)
    model.train()
    result = torch.compile(model, backend="qlora", options={"lowering": "eager"})
    run = result(x_())
    assert bool(layer_tracing._refused) == in_line
    if not in_line:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_tracing, "BACKENDS", [])
            flat = torch.compile(copy.deepcopy(model), backend="qlora", options={"lowering": "eager"})
            assert torch.equal(run, flat(x_()))
    torch.testing.assert_close(run, model(x_()), rtol=1e-3, atol=1e-4)
    return result


def x_() -> Tensor:
    return torch.randn(3, 18, generator=torch.Generator().manual_seed(1)).requires_grad_()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of each call of a layer: "traced" or "moved"."""
    done: list[str] = []
    for name, what in (("of", "traced"), ("call", "moved")):
        original = getattr(layer_tracing._Region, name)

        def counted(*args: Any, _original: Any = original, _what: str = what) -> Any:
            done.append(_what)
            return _original(*args)

        monkeypatch.setattr(layer_tracing._Region, name, staticmethod(counted) if name == "of" else counted)
    return done


def test_one_layer_is_traced_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    done, model = calls(monkeypatch), Model()
    result = compiled(model)
    assert done == ["traced"] + ["moved"] * (LAYERS - 1)
    for run in (result, model):
        x = x_()
        run(x).square().sum().backward()
        grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        model.zero_grad()
        first = grads if run is result else first  # noqa: F821
    assert len(grads) == 1 + LAYERS * 4
    for one, other in zip(first, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_every_layer_keeps_its_own_path_in_the_report() -> None:
    model = Model()
    compiled(model)
    paths = {record.module for record in qc.explain(model).stages["fuse_lora_linear"]}
    assert {f"layers.{i}.{name}" for i in range(LAYERS) for name in ("norm", "up", "down")} <= paths


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda layer: setattr(layer, "times", 3),
    lambda layer: layer.eval(),
    lambda layer: layer.up.lora_scaling.update(default=3),
    lambda layer: setattr(layer, "norm", nn.Identity()),
    lambda layer: (
        layer.down.lora_A._parameters.update(default=nn.Parameter(torch.ones(2, 37)))
        or layer.down.lora_B._parameters.update(default=nn.Parameter(torch.ones(18, 2)))
    ),
    lambda layer: setattr(layer.up, "bias", None),
)


def test_a_change_of_one_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the one that was traced: of one whose guards were moved there."""
    model = Model()
    result = compiled(model)
    done = calls(monkeypatch)
    for change in CHANGES:
        before = result(x_())
        assert not done
        change(model.layers[-1])
        after = result(x_())
        torch.testing.assert_close(after, model(x_()), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(after, before)
        assert done == ["traced", *["moved"] * (LAYERS - 2), "traced"]
        done.clear()


def test_numbers_that_have_changed_in_all_layers_are_traced_in_line() -> None:
    """Dynamo makes a float that changed an input of the graph, as a tensor."""
    model = Model()
    result = compiled(model)
    for gain in (0.7, 0.9):
        for layer in model.layers:
            layer.gain, layer.up.lora_scaling["default"] = gain, 2.5 * gain
        torch.testing.assert_close(result(x_()), model(x_()), rtol=1e-3, atol=1e-4)


def test_layers_that_differ_are_traced_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    done, model = calls(monkeypatch), Model()
    model.layers[0].times, model.layers[3].times = 1, True  # equal, and another type
    compiled(model)
    assert done == ["traced", "traced", "moved", "traced"]


def _own_forward(norm: nn.Module) -> None:
    norm.forward = functools.partial(lambda old, x: old(x) * 3, norm.forward)  # as accelerate's hooks do


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, y: y * 3),
        lambda norm: norm.register_forward_pre_hook(lambda module, args: (args[0] * args[0],)),
        _own_forward,
        lambda norm: nn.utils.parametrize.register_parametrization(norm, "weight", nn.Hardtanh(2.0, 3.0)),
    ],
)
def test_code_of_one_layers_own_is_run(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    done, model = calls(monkeypatch), Model()
    change(model.layers[2].norm)
    compiled(model)
    assert done in (["traced", "moved", "moved"], ["traced", "moved", "traced", "moved"])


def test_shared_weights_stay_shared() -> None:
    model = Model()
    model.layers[1].up, model.layers[3].norm = model.layers[2].up, model.layers[0].norm
    result = compiled(model)
    model.layers[3].norm = copy.deepcopy(model.layers[0].norm)
    nn.init.constant_(model.layers[3].norm.weight, 3.0)
    torch.testing.assert_close(result(x_()), model(x_()), rtol=1e-3, atol=1e-4)


class Breaks(Layer):
    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return super().forward(x, pair=pair)


class Counts(Layer):
    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        self.gain = self.gain * 0.5 + 0.25  # 0.5 stays 0.5
        return super().forward(x, pair=pair)


class Writes(Layer):
    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        return super().forward(x * 1, pair=pair).add_(pair[0].mul_(1.0))


class Views(Layer):
    def forward(self, x: Tensor, *, pair: tuple[Tensor, Tensor], cache: None = None) -> Tensor:
        h = super().forward(x, pair=pair)
        return x.view(3, 18) if self.gain == 0.5 else h


@pytest.mark.parametrize("layer", [Breaks, Counts, Writes, Views])
def test_what_cannot_be_one_subgraph_is_traced_in_line(layer: type[nn.Module]) -> None:
    counters.clear()
    compiled(Model(layer), in_line=True)
    assert bool(counters["graph_break"]) == (layer is Breaks)


class Steps(Model):
    """Its own code changes what layers read, between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = Layer()
        self.shared.gain = 0.0
        for layer in self.layers:
            layer.__dict__["model"] = self.shared

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            self.shared.gain = 0.1 * index
            x = layer(x * layer.model.gain, pair=(x, x))
        return x


class Alternates(Model):
    """Gradients off for some layers; one tensor twice, then two tensors."""

    def forward(self, x: Tensor) -> Tensor:
        other = torch.sin(x)
        for index, layer in enumerate(self.layers):
            with torch.set_grad_enabled(index >= 2):
                x = layer(x, pair=(other, other) if index % 2 else (other, other * 2))
        return x


@pytest.mark.parametrize("model", [Steps, Alternates])
def test_what_changes_around_the_layers_is_part_of_the_call(model: type[nn.Module]) -> None:
    compiled(model())


def test_another_backend_sees_the_layers_in_line() -> None:
    model = qc.prepare(Model(), OPTIONS)
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.testing.assert_close(torch.compile(model, backend=backend)(x_()), model(x_()), rtol=1e-3, atol=1e-4)
    (gm,) = graphs
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)


def test_marked_layers_stay_what_they_were() -> None:
    model = qc.prepare(Model(), OPTIONS)
    assert all(type(layer).__name__ == "Layer" and isinstance(layer, Layer) for layer in model.layers)
    assert all(hasattr(layer, ORIGINAL) for layer in model.layers)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x_()), model(x_()))
    assert not any(
        hasattr(module, ORIGINAL) for module in qc.prepare(nn.Sequential(Layer(), Layer()), OPTIONS).modules()
    )
