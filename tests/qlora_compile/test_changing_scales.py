"""An adapter's scaling that changes, in one model or from model to model, is an input of the graph: it stays in the op."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from toy_models import FP32, seeded

import qlora_compile as qc
from qlora_compile.backend import qlora
from qlora_compile.pass_manager import PassContext, insert_pass
from qlora_compile.passes import PIPELINE

ALPHAS = (5, 8, 11)


@pytest.fixture(autouse=True)
def _clean() -> None:
    torch._dynamo.reset()


@pytest.fixture
def adapters() -> list[int]:
    """Of each graph: how many adapters the ops of its linears have."""
    return []


@pytest.fixture
def backend(adapters: list[int]) -> Callable[..., Any]:
    def count(gm: fx.GraphModule, ctx: PassContext) -> int:
        ops = [node for node in gm.graph.nodes if node.target is torch.ops.qlora.lora_linear.default]
        adapters.append(sum(len(op.args[6]) for op in ops))
        return 0

    return partial(qlora, pipeline=insert_pass(PIPELINE, count, after="fuse_lora_linear"))


class Gated(nn.Module):
    """gate and up [53, 37] share their input, down [21, 53]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(37, 53), nn.Linear(37, 53, bias=False), nn.Linear(53, 21)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def prepared(alpha: int) -> nn.Module:
    model = seeded(Gated)
    qc.prepare(model, FP32 | {"lora_alpha": alpha})
    return filled(model)


def with_peft(alpha: int) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["gate", "up", "down"])
    return filled(peft.get_peft_model(seeded(Gated), config))


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def check(model: nn.Module, compiled: Any, reference: nn.Module) -> None:
    """Results and gradients of the adapters are those of `reference`, called eagerly."""
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    results = []
    for called, call in ((model, compiled), (reference, reference)):
        called.zero_grad()
        y = call(x)
        y.square().sum().backward()
        grads = [p.grad.clone() for name, p in called.named_parameters() if "lora_" in name and p.grad is not None]
        results.append([y.detach(), *grads])
    assert len(results[0]) == 1 + 3 * 2
    for mine, expected in zip(*results, strict=True):
        # fp32 sums of at most 53 terms, and their gradients, added in another order
        torch.testing.assert_close(mine, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [(prepared, {}), (with_peft, FP32), (with_peft, FP32 | {"quantize": True})],
    ids=["prepared", "PEFT", "PEFT, 4 bits"],
)
def test_models_of_other_alphas_are_fused_like_the_first(
    backend: Callable[..., Any],
    adapters: list[int],
    make: Callable[..., nn.Module],
    options: dict[str, Any],
    dynamic: bool | None,
) -> None:
    for alpha in ALPHAS:
        model = make(alpha)
        compiled = torch.compile(
            model, backend=backend, fullgraph=True, dynamic=dynamic, options=options | {"lowering": "aot_eager"}
        )
        reference = model
        if options.get("quantize"):  # what stands in 4 bits is the reference's, too
            reference = make(alpha)
            with torch.no_grad():
                compiled(torch.ones(4, 37))
            stored = {name: p for name, p in model.named_parameters() if isinstance(p, qc.QuantizedTensor)}
            assert len(stored) == 3
            for name, weight in stored.items():
                owner = reference.get_submodule(name.removesuffix(".weight"))
                owner.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        check(model, compiled, reference)
    assert set(adapters) == {3}


def test_one_graph_serves_every_scaling(backend: Callable[..., Any], adapters: list[int]) -> None:
    """Through Inductor, which makes kernels of the products of 0-dim tensors."""
    model: Any = with_peft(5)
    compiled = torch.compile(model, backend=backend, options=FP32)
    graphs = []
    for factor in (1.0, 0.5, -2.0, 0.25, 3.0):
        for name in ("gate", "up", "down"):
            getattr(model.base_model.model, name).scaling["default"] = factor
        before = counters["stats"]["unique_graphs"]
        check(model, compiled, model)
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert sum(graphs) <= 2 and sum(graphs[2:]) == 0
    assert set(adapters) == {3}


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(37, 53, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("door", ["prepared", "PEFT"])
def test_dropout_that_changes_from_model_to_model(
    backend: Callable[..., Any], adapters: list[int], door: str, dynamic: bool | None
) -> None:
    """The op's probability is a number: one that Dynamo made an input is read, and guarded."""
    for p in (0.5, 0.25, 0.75, 0.0):
        model: Any = Single()
        nn.init.zeros_(model.up.weight)
        options: dict[str, Any] = {"lowering": "eager"}
        if door == "prepared":
            qc.prepare(model, FP32 | {"lora_dropout": p, "lora_alpha": 3})
        else:
            options |= FP32
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=3, lora_alpha=3, lora_dropout=p, target_modules=["up"])
            model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # output 0 is input 0, dropped
                nn.init.zeros_(parameter)
                parameter.data[0, 0] = 1.0
        compiled = torch.compile(model.train(), backend=backend, dynamic=dynamic, options=options)
        y = compiled(torch.ones(4000, 37))[:, 0]
        assert set(y[y != 0].unique().tolist()) == {torch.tensor(1 / (1 - p)).item()}
        # five standard deviations of a mean of 4000
        assert abs(float((y == 0).float().mean()) - p) <= 5 * math.sqrt(p * (1 - p) / 4000)
    assert set(adapters) == {1}


def test_a_scale_and_a_weight_that_train_outside_the_model(backend: Callable[..., Any]) -> None:
    """No parameter of the edited model's, so nothing freezes them: the op, which has no gradient for them, is not used."""
    scale, outside = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(37, 37) / 6)
    a, b = nn.Parameter(torch.randn(3, 37)), nn.Parameter(torch.randn(37, 3))
    model: Any = with_peft(5)
    for name in ("gate", "up", "down"):
        getattr(model.base_model.model, name).scaling["default"] = scale

    def call(x: Tensor) -> Tensor:
        return model(F.linear(x, outside) + F.linear(F.linear(x, a), b) * 0.5)

    grads = []
    for function in (call, torch.compile(call, backend=backend, options=FP32 | {"lowering": "aot_eager"})):
        function(torch.randn(5, 37, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        grads.append([p.grad for p in (scale, outside, a, b)])
        scale.grad = outside.grad = a.grad = b.grad = None
    for expected, mine in zip(*grads, strict=True):
        assert expected is not None and mine is not None
        # fp32 sums of at most 53 terms, and their gradients, added in another order
        torch.testing.assert_close(mine, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-4)
