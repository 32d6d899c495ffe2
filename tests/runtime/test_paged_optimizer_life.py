"""Paged optimizers beside other code: parameters that it changes, optimizers made again, copied, or out of memory."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import signal
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import AOT_FP32, MLP, compile_model

import qlora_compile as qc
from qlora_compile.errors import CheckpointError, ConfigError, MemoryBudgetError, ModelStateError
from qlora_compile.page_ops import PAGER
from qlora_compile.runtime import kernels, paged_optimizer_sweep
from qlora_compile.runtime.kernels import cpp_build, cpu

Kernel = Callable[..., None]


def make_params(count: int = 4, dtype: torch.dtype = torch.float32, size: int = 67) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(size, 41, generator=generator).to(dtype)) for _ in range(count)]


def give_gradients(params: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def stepped(params: list[nn.Parameter], steps: int = 1, **options: Any) -> qc.PagedAdamW:
    optimizer = qc.PagedAdamW(params, **options)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return optimizer


def every_kernel() -> list[Kernel | None]:
    if cpp_build.find_compiler() is None:
        return [None]
    kernel = kernels.find("paged_step", "cpu")
    assert kernel is not None
    return [None, *[lambda *args, isa=isa: kernel(*args, isa=isa) for isa in ("auto", *cpu.supported_isas())]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_half_parameter_that_others_wrote_into_keeps_what_they_wrote(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of 0 updates nothing: what was written stays to the bit, and the master of the rest."""
    for kernel in every_kernel():
        monkeypatch.setattr(paged_optimizer_sweep.kernels, "find", lambda op, device, kernel=kernel: kernel)
        (param,) = params = make_params(1, dtype, size=131)  # blocks of 256 and a rest
        optimizer = stepped(params, 3, lr=1e-3, state_bits=bits, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 0.0
        before = optimizer.state[param]["master"]
        written = torch.randn(131, 41).to(dtype)
        chosen = torch.rand(131, 41) < 0.5
        param.data = torch.where(chosen, written, param.data)  # no version counter sees it
        expected = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, expected)
        kept = torch.where(before.to(dtype) == expected, before, expected.float())
        assert torch.equal(optimizer.state[param]["master"], kept)
        assert not torch.equal(before, before.to(dtype).float())


def test_a_state_that_is_loaded_before_its_model_does_not_bring_the_old_weights_back() -> None:
    trained = make_params(2, torch.bfloat16)
    saved = stepped(trained, 3, lr=1e-2).state_dict()
    fresh = [nn.Parameter(torch.zeros_like(p)) for p in trained]
    optimizer = qc.PagedAdamW(fresh)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        for p, q in zip(fresh, trained, strict=True):
            p.copy_(q)
    give_gradients(fresh)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(fresh, trained, strict=True))


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_a_deleted_optimizer_is_gone_with_its_pages(step_in_backward: bool) -> None:
    """At once, while its parameters live on: no cycle waits for the collector."""
    params = make_params()
    optimizer = qc.PagedAdamW(params, device_budget="64KiB", step_in_backward=step_in_backward)
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    pages = [weakref.ref(page) for page in optimizer.pool._table.pages.values()]
    dead = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert dead() is None and pages and all(page() is None for page in pages)
    finally:
        gc.enable()
    assert all(getattr(p, PAGER) == -1 and not p._post_accumulate_grad_hooks for p in params)
    sum(p.square().sum() for p in params).backward()
    assert all(p.grad is not None for p in params)  # another optimizer finds its gradients


@pytest.mark.parametrize("paged", [False, True])
def test_a_compiled_model_is_freed_beside_its_graphs(paged: bool) -> None:
    """Dynamo keeps the graphs until the process ends: one after another, in a sweep, they would keep every model."""
    model = qc.prepare(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)), {"r": 4})
    optimizer_class = qc.PagedAdamW if paged else torch.optim.AdamW
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad])
    compiled = torch.compile(model, backend="qlora", options={"lowering": "aot_eager"})
    compiled(torch.randn(5, 64)).square().mean().backward()
    optimizer.step()
    dead = weakref.ref(model), weakref.ref(optimizer)
    del model, compiled, optimizer
    gc.collect()
    assert [one() for one in dead] == [None, None]


def test_groups_ask_for_nothing_that_is_ignored() -> None:
    params = make_params()
    for option in ("maximize", "amsgrad"):
        with pytest.raises(ConfigError, match=f"{option}=True"):
            qc.PagedAdamW([{"params": params, option: True}])
    optimizer = qc.PagedAdamW(params[:1])
    for group in ({"maximize": True}, {"lr": -1.0}, {"betas": (0.9, 0.99, 0.999)}):
        with pytest.raises(ConfigError):
            optimizer.add_param_group({"params": params[1:2], **group})
    with pytest.raises(ModelStateError, match="float64"):
        optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    assert len(optimizer.param_groups) == 1
    give_gradients(params)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:2]})
    optimizer.step()
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    "option",
    [
        {"state_bits": 8},
        {"device_budget": "1MiB"},
        {"host_budget": 1},
        {"page_folder": None},
        {"step_in_backward": True},
    ],
)
def test_what_is_of_the_whole_optimizer_is_no_groups(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(option))} is of the whole optimizer: give it to PagedLion\("):
        qc.PagedLion([{"params": make_params(), **option}])


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_an_option_that_a_group_gets_later_is_refused_at_the_step(step_in_backward: bool) -> None:
    params = make_params()
    optimizer = qc.PagedAdamW(params, step_in_backward=step_in_backward)
    optimizer.param_groups[0]["maximize"] = True
    before = [p.detach().clone() for p in params]
    with pytest.raises(ConfigError, match="maximize=True"):
        sum(p.square().sum() for p in params).backward()
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)) and not optimizer.state


def test_a_parameter_is_once_in_its_group() -> None:
    params = make_params()
    with pytest.raises(ConfigError, match="has a parameter twice"), pytest.warns(UserWarning, match="duplicate"):
        qc.PagedAdamW([*params, params[1]])
    optimizer = qc.PagedAdamW(params[:1])
    with pytest.raises(ConfigError, match="has a parameter twice"), pytest.warns(UserWarning, match="duplicate"):
        optimizer.add_param_group({"params": [params[1], params[1]]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_frozen_parameter_of_a_type_without_a_layout_cannot_train_later(dtype: torch.dtype) -> None:
    params = [*make_params()[:1], nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)]
    optimizer = qc.PagedAdamW(params)
    params[1].requires_grad_(True)
    for p in params:
        p.grad = torch.ones_like(p)
    before = params[0].detach().clone()
    with pytest.raises(ModelStateError, match=f"for fp32, bf16 and fp16 parameters, not {dtype}"):
        optimizer.step()
    assert torch.equal(params[0], before) and not optimizer.state
    if dtype.is_complex:
        return
    saved = torch.optim.AdamW(params)
    saved.step()
    with pytest.raises(ModelStateError, match=f"not {dtype}"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_a_step_without_any_gradient_is_said_once(step_in_backward: bool, recwarn: pytest.WarningsRecorder) -> None:
    params = make_params()
    optimizer = qc.PagedAdamW(params, step_in_backward=step_in_backward)
    params[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not recwarn.list
    optimizer.step()
    optimizer.step()
    (said,) = recwarn.list
    assert "No parameter of this PagedAdamW has a gradient, so its step changed nothing" in str(said.message)


@pytest.mark.parametrize("door", ["prepare", "compile"])
def test_an_optimizer_of_weights_that_are_quantized_later_is_said(door: str) -> None:
    model, x = MLP(), torch.randn(5, 37)
    optimizer = qc.PagedAdamW(model.parameters())
    with pytest.warns(UserWarning, match="made of dense weights that are quantized now") as said:
        compiled = compile_model(qc.prepare(model, AOT_FP32) if door == "prepare" else model)
        compiled(x).sum().backward()
    assert len(said) == 1
    with pytest.warns(UserWarning, match="an unprepared model gets its adapters"):
        optimizer.step()


def test_states_of_other_optimizers_are_refused() -> None:
    params = make_params(1)
    give_gradients(params)
    others = {
        "decoupled_weight_decay": torch.optim.Adam(params, weight_decay=0.1),
        "amsgrad": torch.optim.AdamW(params, amsgrad=True),
    }
    for name, other in others.items():
        other.step()
        with pytest.raises(CheckpointError, match=name):
            qc.PagedAdamW(params).load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match="second moment: it is not Lion's"):
        qc.PagedLion(params).load_state_dict(stepped(params).state_dict())
    wrong = stepped(params).state_dict()
    wrong["param_groups"][0]["betas"] = (0.9, 0.99, 0.999)
    with pytest.raises(CheckpointError, match="betas must be two"):
        qc.PagedAdamW(params).load_state_dict(wrong)


def test_a_state_that_finds_no_room_changes_nothing() -> None:
    params = make_params(8)
    saved = stepped(params, 5, lr=0.5).state_dict()
    optimizer = qc.PagedAdamW(params, lr=0.25, device_budget="32KiB", host_budget="64KiB")
    give_gradients(params[:1])
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(MemoryBudgetError):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys() == {0}
    for name, value in before["state"][0].items():
        assert torch.equal(value, after["state"][0][name]), name
    give_gradients(params[:1])
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


def test_loading_fills_what_is_there_and_hooks_may_change_it() -> None:
    params = make_params(3)
    saved = stepped(params, 2).state_dict()
    optimizer = stepped(params, 5)
    pages = optimizer.statistics().pages
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {0: state["state"][0]}})
    optimizer.register_load_state_dict_post_hook(seen.append)
    optimizer.load_state_dict(saved)
    assert [p in optimizer.state for p in params] == [True, False, False] and seen == [optimizer]
    assert optimizer.state[params[0]]["step"] == 2 and optimizer.statistics().pages <= pages
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_the_state_is_a_mapping_as_torchs_is() -> None:
    params = make_params(2)
    optimizer = stepped(params[:1])
    optimizer.add_param_group({"params": params[1:]})
    state = optimizer.state
    assert params[0] in state and params[1] not in state and state[params[1]] == {}
    assert state.pop(params[1], None) is None
    with pytest.raises(KeyError):
        state.pop(params[1])
    assert set(state.pop(params[0])) == {"step", "exp_avg", "exp_avg_sq"} and len(optimizer.state) == 0
    stepped_again = stepped(params)
    stepped_again.state = defaultdict(dict)  # type: ignore[assignment]
    assert stepped_again.state_dict()["state"] == {} and stepped_again.statistics().pages == 0
    with pytest.raises(ModelStateError, match="load_state_dict"):
        stepped_again.state = {params[0]: {}}  # type: ignore[assignment]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_in_a_sentence(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(ModelStateError, match="keep state_dict"):
        copied(stepped(make_params()))


def test_frozen_parameters_may_be_given_and_train_later() -> None:
    def run(step_in_backward: bool) -> list[Tensor]:
        params = make_params(3)
        codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        params[1].requires_grad_(False)
        optimizer = qc.PagedAdamW([*params, codes], lr=0.1, step_in_backward=step_in_backward)
        for step in range(4):
            if step == 2:
                params[1].requires_grad_(True)
            sum((p + 1).square().sum() for p in params).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_a_later_optimizer_of_one_parameter_is_named_by_the_first() -> None:
    params = make_params()
    first = qc.PagedAdamW(params, step_in_backward=True)
    second = qc.PagedAdamW(params[1:2])
    with pytest.raises(ModelStateError, match=r"1 parameters of this PagedAdamW .* number 1 among them"):
        sum(p.square().sum() for p in params).backward()
    with pytest.raises(ModelStateError, match="taken over by a paged optimizer made later"):
        first.step()
    del second


def test_a_backward_pass_that_failed_is_over_with_zero_grad() -> None:
    params = make_params(2)
    optimizer = qc.PagedAdamW(params, step_in_backward=True)

    def fails(_: Tensor) -> None:
        raise ValueError("by the user")

    handle = params[1].register_hook(fails)
    with pytest.raises(ValueError, match="by the user"):
        (params[1].square().sum() + params[0].square().sum()).backward()
    handle.remove()
    with pytest.raises(ModelStateError, match=r"zero_grad\(\) to go on after one that failed"):
        params[0].square().sum().backward()
    optimizer.zero_grad()
    sum(p.square().sum() for p in params).backward()
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1


def test_a_copy_of_a_parameter_belongs_to_nobody() -> None:
    model = qc.prepare(nn.Sequential(nn.Linear(64, 32)), {"r": 2, "lowering": "aot_eager"})
    optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], step_in_backward=True)
    twin = copy.deepcopy(model)
    twin.compile(backend="qlora")
    twin(torch.randn(3, 64)).sum().backward()
    assert any(p.grad is not None for p in twin.parameters()) and len(optimizer.state) == 0


class Two(nn.Module):
    """One graph: a Sequential's forward is torch's own, and each of its layers is compiled by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class TestCompiledBackward:
    """With step_in_backward only what the backward pass was to reach is updated."""

    def made(self) -> tuple[nn.Module, list[nn.Parameter], qc.PagedAdamW]:
        model = qc.prepare(Two(), {"r": 2, "lowering": "aot_eager"})
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = qc.PagedAdamW(params, lr=0.1, step_in_backward=True)
        model.compile(backend="qlora")
        return model, params, optimizer

    def test_gradients_of_inputs_train_nothing(self) -> None:
        model, params, optimizer = self.made()
        x = torch.randn(3, 64, requires_grad=True)
        before = [p.detach().clone() for p in params]
        torch.autograd.grad(model(x).square().sum(), x)
        model(x).square().sum().backward(inputs=[x])
        assert x.grad is not None and all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        model(x).square().sum().backward(inputs=params[:1])
        assert [p in optimizer.state for p in params] == [True, False, False, False]

    def test_gradients_of_parameters_are_not_to_be_had(self) -> None:
        model, params, _ = self.made()
        with pytest.raises(ModelStateError, match="does not return"):
            torch.autograd.grad(model(torch.randn(3, 64)).sum(), params)

    def test_hooks_see_their_gradient(self) -> None:
        found = []
        for compiled in (False, True):
            torch.manual_seed(0)
            torch._dynamo.reset()
            model = qc.prepare(nn.Sequential(nn.Linear(64, 48)), {"r": 2, "lowering": "aot_eager"})
            params = [p for p in model.parameters() if p.requires_grad]
            params[0].register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
            optimizer = qc.PagedAdamW(params, lr=0.1, step_in_backward=True)
            if compiled:
                model.compile(backend="qlora")
            for _ in range(3):
                model(torch.ones(3, 64)).square().sum().backward()
                optimizer.step()
            found.append([p.detach() for p in params])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_full_host_costs_no_step(self) -> None:
        """What the next backward pass does not find on the host is there still."""
        model = qc.prepare(nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), {"r": 16, "lowering": "aot_eager"})
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = qc.PagedAdamW(params, device_budget="256KiB", host_budget="32KiB")
        model.compile(backend="qlora")
        for step in range(3):
            model(torch.randn(3, 64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(optimizer.state[p]["step"] == step + 1 for p in params)


def test_a_thousandth_optimizer_has_no_more_threads_than_the_first() -> None:
    before = threading.active_count()
    for _ in range(20):
        optimizer = stepped(make_params(), 2, device_budget="8KiB")
        assert optimizer.statistics().moved_in_bytes > 0
        del optimizer
    gc.collect()
    for _ in range(200):  # a thread ends when it sees that nobody can ask it for anything
        if threading.active_count() == before:
            break
        time.sleep(0.02)
    assert threading.active_count() == before


def test_a_budget_that_another_thread_lowers_waits_for_the_step() -> None:
    params = make_params(8)
    optimizer = stepped(params, device_budget="64KiB")
    over = threading.Event()

    def change() -> None:
        for size in itertools.cycle(("8KiB", "64KiB")):
            optimizer.pool.budget = size
            if over.wait(0.0005):
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(150):
            optimizer.step()
    finally:
        over.set()
        thread.join()
    assert {int(optimizer.state[p]["step"]) for p in params} == {151}


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize("options", [{}, {"device_budget": "8KiB"}], ids=["resident", "paged"])
def test_an_interrupted_step_is_a_whole_step(options: dict[str, Any]) -> None:
    """With betas (0, 0) a first moment is the last gradient, whose every element is the number of its step."""
    params = make_params(6)
    optimizer = qc.PagedAdamW(params, betas=(0, 0), **options)
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    step, interrupted = 0, 0
    try:
        for delay in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0003 * delay)
                for _ in range(2000):
                    for p in params:
                        p.grad = torch.full_like(p, step + 1)
                    step += 1
                    optimizer.step()
            except KeyboardInterrupt:
                interrupted += 1
            # it came in a step, whose end it waited for, or before one that never began
            found = {float(x) for p in params for x in optimizer.state[p]["exp_avg"].view(-1)} if step > 1 else {1.0}
            assert len(found) == 1 and found <= {float(step), float(step - 1)}, (delay, found, step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
    assert interrupted == 60
    optimizer.step()
