"""Backward graphs with a paged optimizer: same numbers by every way to step, what is planned, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.errors import ModelStateError, NonFiniteError
from qlora_compile.runtime.optimizer import trainable_parameters

CONFIG = {"r": 5, "compute_dtype": "float32", "init_lora_weights": False, "lowering": "aot_eager"}
Maker = Callable[..., nn.Module]


def train(
    make: Maker,
    steps: int = 3,
    *,
    compiled: bool = True,
    layers: int = 2,
    outlined: bool = False,
    checkpointing: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """-> (losses, trained parameters, optimizer, model)."""
    model = qc.prepare(make(num_hidden_layers=layers), CONFIG | {"outline_layers": outlined}).train()
    optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if compiled:
        model.compile(backend="qlora")
    losses = []
    for step in range(steps):
        ids = torch.randint(3, 211, (2, 13), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trainable_parameters(model).items()}, optimizer, model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_way_to_step_gives_the_same_bits(tiny_llama: Maker) -> None:
    losses, wanted, plain, model = train(tiny_llama)
    assert qc.explain(model).paging == [] and plain.statistics().moved_in_bytes == 0
    (idle,) = (done for done in qc.explain(model).passes if done.name == "page_optimizer")
    assert idle.declined == (("PagedAdamW", "it has no device_budget: all of its state stays on the device"),)
    ways: dict[str, dict[str, Any]] = {
        "gradients in pages": {"device_budget": "256KiB"},
        "gradients beside them": {"device_budget": "32KiB"},
        "in backward": {"device_budget": "64KiB", "step_in_backward": True},
        "in backward, all resident": {"step_in_backward": True},
    }
    for name, options in ways.items():
        found, parameters, optimizer, model = train(tiny_llama, **options)
        assert found == losses and same(wanted, parameters), name
        timelines = qc.explain(model).paging
        statistics = optimizer.statistics()
        assert len(timelines) == 1 and timelines[0].step_in_backward == ("backward" in name), name
        if "device_budget" in options:
            assert statistics.moved_in_bytes > 0 and statistics.peak_device_bytes <= statistics.budget_bytes, name
            assert timelines[0].prefetches and timelines[0].peak_bytes <= 1.5 * statistics.budget_bytes, name
            assert any(move.hidden_ms > 0 for move in timelines[0].prefetches), name
            shown = " ".join(str(qc.explain(model)).split())
            assert f"{timelines[0].gradients_in_pages} gradients lie in pages" in shown
    eager, parameters, *_ = train(tiny_llama, compiled=False, device_budget="64KiB", step_in_backward=True)
    without, others, *_ = train(tiny_llama, compiled=False)
    assert eager == without and same(parameters, others)


def test_an_evaluation_has_no_backward_graph_to_say_anything_of(tiny_llama: Maker) -> None:
    *_, model = train(tiny_llama, steps=1, layers=1, device_budget="64KiB")
    before = qc.explain(model)
    with torch.no_grad():
        model(input_ids=torch.randint(3, 211, (2, 13)))
    after = qc.explain(model)
    assert after.graphs == before.graphs + 1
    assert [p for p in after.passes if p.name == "page_optimizer"] == [
        p for p in before.passes if p.name == "page_optimizer"
    ]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_of_transformers_changes_no_bit(tiny_llama: Maker, compiled: bool) -> None:
    """Eager hooks and the compiled graph see each gradient once, though its layer runs twice."""
    losses, wanted, *_ = train(tiny_llama, compiled=compiled, layers=1)
    for step_in_backward in (False, True):
        paged = {"device_budget": "64KiB", "step_in_backward": step_in_backward}
        found, parameters, optimizer, _ = train(tiny_llama, compiled=compiled, layers=1, checkpointing=True, **paged)
        assert found == losses and same(wanted, parameters), step_in_backward
        assert optimizer.statistics().peak_device_bytes <= 64 * 1024


def test_calls_of_an_outlined_layer_take_the_time_of_what_is_in_it(tiny_llama: Maker) -> None:
    """Else the clock of the plan stands still in them, and every prefetch goes to the start."""
    shapes: dict[str, Any] = {"layers": 3, "device_budget": "64KiB", "step_in_backward": True}
    found = [train(tiny_llama, steps=1, outlined=outlined, **shapes) for outlined in (False, True)]
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1])
    flat, outlined = (qc.explain(model).paging[0] for *_, model in found)
    assert outlined.backward_ms == pytest.approx(flat.backward_ms, rel=0.2)  # a region's temporaries are its own
    begun = sorted(move.issued_ms for move in outlined.prefetches)
    assert begun[-1] > 0.3 * outlined.backward_ms


def test_a_gradient_is_a_view_of_its_page_and_outlives_it(tiny_llama: Maker) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=1), CONFIG).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = qc.PagedAdamW(parameters, lr=1e-2, device_budget="256KiB")
    model.compile(backend="qlora")
    ids = torch.randint(3, 211, (2, 13))

    def backward() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    backward()
    storages = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    assert len(storages) < len(parameters)
    assert optimizer.statistics().gradient_bytes == len(storages) * optimizer.pool.page_bytes
    once = [p.grad.clone() for p in parameters if p.grad is not None]
    backward()  # accumulates: the pages are there already
    for p, before in zip(parameters, once, strict=True):
        assert p.grad is not None and torch.equal(p.grad, 2 * before)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
    assert float(norm) > 1e-3
    kept = parameters[0].grad
    assert kept is not None
    copy = kept.clone()
    optimizer.zero_grad()
    assert optimizer.statistics().gradient_bytes == 0
    backward()
    assert torch.equal(kept, copy) and parameters[0].grad is not None and not torch.equal(parameters[0].grad, copy)
    for p in parameters:  # dropped without our zero_grad
        p.grad = None
    backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, once) if p.grad is not None)


def test_an_equal_model_and_a_later_optimizer_get_code_of_their_own(tiny_llama: Maker) -> None:
    """Both pass every guard of the first model's code, whose ops name the first optimizer."""
    *_, first, _ = train(tiny_llama, 1, step_in_backward=True)
    _, wanted, _, _ = train(tiny_llama, 2)
    _, found, second, model = train(tiny_llama, 2, step_in_backward=True)
    assert not first.pager.taken and not second.pager.taken and same(wanted, found)
    ids = torch.randint(3, 211, (2, 13))
    third = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], step_in_backward=True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(second.pager.taken) == len(third.state) == len(found)
    assert all(p.grad is None for p in model.parameters())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Pieces(nn.Module):
    """A graph for each layer: after a graph break, or where each is compiled by itself, Dynamo has one code for all."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.layers, self.breaks = nn.ModuleList(Layer() for _ in range(3)), breaks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return x.square().mean()


@pytest.mark.parametrize("way", ["graph breaks", "by the layer"])
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_code_that_serves_several_layers_names_no_parameters(step_in_backward: bool, way: str) -> None:
    found: list[tuple[list[float], list[Tensor]]] = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = qc.prepare(Pieces(way == "graph breaks"), CONFIG)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = qc.PagedAdamW(parameters, lr=1e-2, device_budget="512KiB", step_in_backward=step_in_backward)
        if compiled:
            for module in [model] if way == "graph breaks" else model.layers:  # type: ignore[union-attr]
                module.compile(backend="qlora")
        losses = []
        for step in range(3):
            loss = model(torch.randn(5, 64, generator=torch.Generator().manual_seed(step)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append((losses, [p.detach().clone() for p in parameters]))
    (wanted, eager), (got, ours) = found
    assert got == wanted and all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
    declined = [reason for report in qc.explain(model).passes for _, reason in report.declined]
    assert any("they page without it" in reason for reason in declined)


class Reordered(Pieces):
    """Its layers in another order at every call, or one of them alone: each time the same code fits."""

    def __init__(self, alone: bool) -> None:
        super().__init__(breaks=False)
        self.alone, self.calls = alone, 0

    def one(self, layer: nn.Module, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return layer(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.alone:
            return self.one(self.layers[self.calls % 3], x).square().mean()
        return super().forward(x)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_ops_never_name_other_parameters_than_the_call_s(step_in_backward: bool, alone: bool) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(5)
        model = qc.prepare(Reordered(alone), CONFIG)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = qc.PagedAdamW(parameters, lr=1e-2, device_budget="512KiB", step_in_backward=step_in_backward)
        if compiled:
            model.compile(backend="qlora")
        for step in range(4):
            model(torch.randn(5, 64, generator=torch.Generator().manual_seed(step))).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.calls += 1
            model.layers = nn.ModuleList([model.layers[2], model.layers[0], model.layers[1]])
        found.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestRefusals:
    def backward(self, tiny_llama: Maker) -> tuple[qc.PagedAdamW, Callable[[], None]]:
        model = qc.prepare(tiny_llama(num_hidden_layers=1), CONFIG).train()
        optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], step_in_backward=True)
        ids = torch.randint(3, 211, (2, 13))
        return optimizer, lambda: model(input_ids=ids, labels=ids).loss.backward()

    def test_accumulation(self, tiny_llama: Maker) -> None:
        _, backward = self.backward(tiny_llama)
        backward()
        with pytest.raises(ModelStateError, match="second gradient before PagedAdamW"):
            backward()

    def test_a_scaler(self, tiny_llama: Maker) -> None:
        optimizer, backward = self.backward(tiny_llama)
        backward()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        with pytest.raises(ModelStateError, match="before a GradScaler could unscale"):
            scaler.step(optimizer)

    def test_several_processes(self, tiny_llama: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        _, backward = self.backward(tiny_llama)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        with pytest.raises(ModelStateError, match="averaged over 3 processes"):
            backward()

    def test_what_is_not_finite_is_left_out_and_named(self, tiny_llama: Maker) -> None:
        optimizer, backward = self.backward(tiny_llama)
        parameters = optimizer.param_groups[0]["params"]
        parameters[3].register_hook(lambda gradient: gradient * float("nan"))
        before = [p.detach().clone() for p in parameters]
        backward()
        with pytest.raises(NonFiniteError, match="of 1 parameters were not finite, number 3"):
            optimizer.step()
        changed = [not torch.equal(p, q) for p, q in zip(parameters, before, strict=True)]
        assert changed == [number != 3 for number in range(len(parameters))]


@pytest.mark.parametrize("step_in_backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_inductor_keeps_the_ops_and_their_order(tiny_llama: Maker, step_in_backward: bool) -> None:
    config = CONFIG | {"lowering": "inductor"}
    results = []
    for options in ({}, {"device_budget": "256KiB", "step_in_backward": step_in_backward}):
        model = qc.prepare(tiny_llama(num_hidden_layers=1), config).train()
        optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
        model.compile(backend="qlora")
        for step in range(3):
            ids = torch.randint(3, 211, (2, 13), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: p.detach().clone() for name, p in trainable_parameters(model).items()})
    kinds = [event.kind for event in optimizer.pool.events]
    assert "page_in" in kinds and same(*results)


def test_ops_are_what_their_schemas_say() -> None:
    token, g = torch.empty(1, dtype=torch.uint8), torch.randn(3, 5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qlora.prefetch_page.default, (token, [g], -1, [0]), test_utils=tests)
    torch.library.opcheck(torch.ops.qlora.accumulate_grad.default, ([g, g], -1, [0, 1]), test_utils=tests)
    torch.library.opcheck(torch.ops.qlora.evict_page.default, (token, -1, [0]), test_utils=tests)
    with pytest.raises(ModelStateError, match="gone or was replaced"):
        torch.ops.qlora.step_page(token, [g], [], -1, [0])
