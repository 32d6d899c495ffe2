"""One optimizer step: exact accumulation and clipping, loss scaling, and what happens when numbers are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile import step_plans
from qlora_compile.errors import ConfigError, MemoryBudgetError, NoAdapterError, NonFiniteError
from qlora_compile.memory_plan import Buffer, Event, MemoryPlan, Size
from qlora_compile.runtime.data import IGNORE, Batch, count_loss_tokens
from qlora_compile.runtime.micro_batches import is_out_of_memory
from qlora_compile.runtime.optimizer import make_optimizer, trainable_parameters
from qlora_compile.runtime.step_memory import StepMemory
from qlora_compile.runtime.train_step import TrainStep

CONFIG = {"r": 3, "compute_dtype": "float32", "init_lora_weights": False}


def make_batch(rows: int, learned: list[int], seed: int = 0, seq_len: int = 13) -> Batch:
    """`learned[i]` labels of row i count."""
    ids = torch.randint(3, 211, (rows, seq_len), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, count in zip(labels, learned):
        row[: seq_len - count] = IGNORE
    return Batch(ids, labels, count_loss_tokens(labels))


@pytest.fixture
def model(tiny_llama: Callable[..., nn.Module]) -> nn.Module:
    return qc.prepare(tiny_llama(num_hidden_layers=2), CONFIG).train()


class TestOptimizer:
    def test_it_holds_the_adapters(self, model: nn.Module) -> None:
        optimizer = make_optimizer(model, lr=0.1, weight_decay=0.2)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in trainable_parameters(model).values()} and len(held) == 2 * 7 * 2
        assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.1, 0.2)

    def test_an_unprepared_model_is_refused(self, tiny_llama: Callable[..., nn.Module]) -> None:
        dense = tiny_llama()
        with pytest.raises(NoAdapterError, match=r"given no adapter parameters: call qlora_compile\.prepare"):
            make_optimizer(dense)

    def test_lists_without_adapters_are_refused(self, model: nn.Module) -> None:
        with pytest.raises(NoAdapterError, match="given no adapter parameters"):
            make_optimizer(model, [])
        with pytest.raises(NoAdapterError, match="given no adapter parameters"):
            make_optimizer(model, [nn.Parameter(torch.ones(3))])


def gradients_of(model: nn.Module, batches: list[Batch], **options: Any) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer sees in one step."""
    seen: dict[str, torch.Tensor] = {}
    optimizer = make_optimizer(model)
    parameters = trainable_parameters(model)

    def keep(*args: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    TrainStep(model, optimizer, **({"max_grad_norm": 0.0} | options))(batches, lr=0.0)
    return seen


def test_uneven_micro_batches_give_the_gradient_of_the_whole_batch(model: nn.Module) -> None:
    parts = [make_batch(2, [11, 2], seed=1), make_batch(2, [1, 0], seed=2), make_batch(2, [5, 12], seed=3)]
    assert [part.loss_tokens for part in parts] == [13, 1, 17]
    whole = Batch(torch.cat([p.input_ids for p in parts]), torch.cat([p.labels for p in parts]), 31)
    wanted = gradients_of(model, [whole])
    found = gradients_of(model, parts)
    for name, gradient in wanted.items():
        # Against fp64 each of the two is off by up to 900 fp32 roundings (2^-24) of the largest value, by the CPU's order of
        # summing: this model is steep. Batches weighted alike would be off by tens of percent.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=3e-4 * float(gradient.abs().max()))
    # An unweighted mean of the parts' means would be something else altogether.
    means = [gradients_of(model, [part]) for part in parts]
    name = next(iter(wanted))
    unweighted = torch.stack([mean[name] for mean in means]).mean(0)
    assert (unweighted - wanted[name]).abs().max() > 0.1 * wanted[name].abs().max()


def test_the_loss_is_the_mean_over_all_tokens(model: nn.Module) -> None:
    parts = [make_batch(2, [11, 2], seed=1), make_batch(2, [1, 3], seed=2)]
    with torch.no_grad():
        losses = [float(model(input_ids=p.input_ids, labels=p.labels).loss) for p in parts]
    result = TrainStep(model, make_optimizer(model), max_grad_norm=0.0)(parts, lr=1e-3)
    wanted = (losses[0] * 13 + losses[1] * 4) / 17
    assert result.loss == pytest.approx(wanted, rel=1e-6) and result.loss_tokens == 17 and not result.skipped


def test_clipping_bounds_the_global_norm(model: nn.Module) -> None:
    batch = make_batch(2, [12, 9])
    free = gradients_of(model, [batch])
    norm = float(torch.cat([g.flatten() for g in free.values()]).norm())
    clipped = gradients_of(model, [batch], max_grad_norm=norm / 3)
    for name, gradient in free.items():
        # clip_grads_with_norm_ divides by norm + 1e-6.
        torch.testing.assert_close(clipped[name], gradient / 3, rtol=1e-5, atol=1e-12)
    untouched = gradients_of(model, [batch], max_grad_norm=norm * 3)
    assert all(torch.equal(untouched[name], free[name]) for name in free)
    step = TrainStep(model, make_optimizer(model), max_grad_norm=norm / 3)
    assert step([batch], lr=0.0).grad_norm == pytest.approx(norm, rel=1e-6)


def test_the_rate_is_set_and_no_gradient_stays(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    step = TrainStep(model, make_optimizer(model, lr=9.0), max_grad_norm=1.0)
    step([make_batch(2, [12, 9])], lr=1e-3)
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is None
        moved = (parameter.detach() - before[name]).abs().max()
        # Adam's first step moves each value by the learning rate, wherever its gradient is far above eps.
        assert 0 < moved <= 1.01e-3


class Poisoned(nn.Module):
    """The model, its loss multiplied by what `factors` gives for each call."""

    def __init__(self, model: nn.Module, factors: list[float]) -> None:
        super().__init__()
        self.model = model
        self.factors = iter(factors)

    def forward(self, **inputs: Any) -> Any:
        return SimpleNamespace(loss=self.model(**inputs).loss * next(self.factors))


def test_a_bad_step_is_skipped_and_changes_nothing(model: nn.Module) -> None:
    nan = float("nan")
    step = TrainStep(Poisoned(model, [1, nan, 1, nan, nan, nan, nan, 1]), make_optimizer(model), max_grad_norm=1.0)
    batch = make_batch(2, [12, 9])
    assert not step([batch], lr=1e-3).skipped
    before = [p.detach().clone() for p in step.parameters.values()]
    moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
    assert step([batch], lr=1e-3).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters.values()))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, step.optimizer.state.values()))
    assert not step([batch], lr=1e-3).skipped
    # Four in a row are borne, and a good step starts the count anew.
    assert [step([batch], lr=1e-3).skipped for _ in range(5)] == [True] * 4 + [False]
    assert step.bad_steps == 0


def test_five_bad_steps_in_a_row_stop_the_run_and_name_a_parameter(model: nn.Module) -> None:
    step = TrainStep(Poisoned(model, [float("inf")] * 9), make_optimizer(model), max_grad_norm=1.0)
    for _ in range(4):
        step([make_batch(2, [12, 9])], lr=1e-3)
    with pytest.raises(NonFiniteError, match=r"5 steps in a row .* of model\..*lora_A"):
        step([make_batch(2, [12, 9])], lr=1e-3)


def test_scaled_gradients_are_unscaled_before_clipping(model: nn.Module) -> None:
    batch = make_batch(2, [12, 9])
    wanted = gradients_of(model, [batch], max_grad_norm=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = gradients_of(model, [batch], max_grad_norm=0.01, scaler=scaler)
    for name, gradient in wanted.items():
        # A power of two scales fp32 without rounding, so only underflow could differ.
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-12)


def test_a_scaler_is_refused_for_what_trains_in_float16(tiny_llama: Callable[..., nn.Module]) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=2), CONFIG | {"adapter_dtype": "float16"})
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ConfigError, match=r"\.lora_A\.default trains in float16: make it float32, or use bfloat16"):
        TrainStep(model, make_optimizer(model), max_grad_norm=1.0, scaler=scaler)


def test_overflow_halves_the_scale_and_is_no_bad_step(model: nn.Module) -> None:
    # fp32 does not overflow at fp16's scales; a huge loss stands for it: finite, with infinite scaled gradients.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
    step = TrainStep(Poisoned(model, [64.0] * 30), make_optimizer(model), max_grad_norm=1.0, scaler=scaler)
    batch = make_batch(2, [12, 9])
    results = [step([batch], lr=1e-3) for _ in range(12)]
    skipped = [result.skipped for result in results]
    first = skipped.index(False)
    assert first > 0 and skipped[:first] == [True] * first
    assert scaler.get_scale() < 2.0**127 and step.bad_steps == 0


def test_at_a_scale_of_one_overflow_counts_as_bad(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    step = TrainStep(Poisoned(model, [float("nan")] * 9), make_optimizer(model), max_grad_norm=1.0, scaler=scaler)
    with pytest.raises(NonFiniteError, match="float16"):
        for _ in range(5):
            step([make_batch(2, [12, 9])], lr=1e-3)


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),  # a kernel is loaded
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_running_out_of_memory(error: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(error) == ran_out


class Tight(nn.Module):
    """Runs out of memory on more than `most` tokens, after `once` on anything."""

    def __init__(self, model: nn.Module, most: int, fails: int = 0) -> None:
        super().__init__()
        self.model, self.most, self.fails, self.seen = model, most, fails, list[int]()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        self.seen.append(input_ids.numel())
        self.fails -= 1
        if input_ids.numel() > self.most or self.fails >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return self.model(input_ids=input_ids, labels=labels)


def test_a_batch_that_does_not_fit_is_split_with_the_same_gradient(tiny_llama: Callable[..., nn.Module]) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=1), CONFIG | {"lora_dropout": 0.0}).train()
    batch = make_batch(7, [11, 2, 0, 5, 12, 1, 3])
    wanted = gradients_of(model, [batch])
    tight, told = Tight(model, 2 * 13), list[str]()
    found = gradients_of(tight, [batch], notice=told.append)
    for name, gradient in wanted.items():
        # fp32 sums over 34 tokens in another order
        torch.testing.assert_close(found[f"model.{name}"], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))
    assert tight.seen == [91, 39, 13, 13, 13, 13, 13, 13] and len(told) == 1
    assert "undone and done again: steps are split into micro-batches of at most 13 tokens" in told[0]


def test_later_steps_keep_to_what_fits_and_any_length_may_come(model: nn.Module) -> None:
    tight = Tight(model, 4 * 13)
    step = TrainStep(tight, make_optimizer(model), max_grad_norm=0.3)
    step([make_batch(6, [3] * 6)], lr=1e-3)
    tight.seen.clear()
    step([make_batch(6, [3] * 6), make_batch(3, [2, 0, 4], seq_len=17), make_batch(1, [30], seq_len=38)], lr=1e-3)
    assert tight.seen == [39, 39, 34, 17, 38]
    with pytest.raises(MemoryBudgetError, match="One sequence of 60 tokens does not fit"):
        step([make_batch(2, [9, 9], seq_len=60)], lr=1e-3)


def test_pages_leave_before_a_step_is_split_and_dropout_draws_the_same(tiny_llama: Callable[..., nn.Module]) -> None:
    losses = []
    for fails in (0, 1):
        model = qc.prepare(tiny_llama(num_hidden_layers=1), CONFIG | {"lora_dropout": 0.3}).train()
        optimizer = qc.PagedAdamW(trainable_parameters(model).values(), lr=1e-3, device_budget="1MiB")
        told = list[str]()
        tight = Tight(model, 1000)
        step = TrainStep(tight, optimizer, max_grad_norm=0.0, notice=told.append)
        torch.manual_seed(5)
        step([make_batch(3, [4, 5, 6])], lr=1e-3)
        tight.fails = fails
        losses.append([step([make_batch(3, [4, 5, 6])], lr=1e-3).loss for _ in range(2)])
        assert len(told) == fails and all("pages were sent to the host" in text for text in told)
        assert (optimizer.statistics().moved_out_bytes > 0) == bool(fails)
        assert step.micro_batches.most_tokens is None
    assert losses[0] == losses[1]


def test_what_the_budget_has_no_room_for_is_split_before_it_runs(
    tiny_llama: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages leave first, then micro-batches get smaller; the gradient is that of the whole batch, up to summation order."""
    dense = tiny_llama(num_hidden_layers=1)
    events = [Event(phase, phase, "", "") for phase in ("forward", "backward")]
    saved = Buffer("x", "", "saved", Size(1000, 1, 1), 0, 1)  # 1000 bytes a token
    plan = MemoryPlan(events, [saved], {"adapters": 4000})  # the trace of a real one takes seconds
    monkeypatch.setattr(step_plans.StepPlans, "by_length", {0: plan})
    memory = StepMemory(dense, qc.QLoRAConfig(**CONFIG), "1GiB", seq_len=13, optimizer="paged_adamw")
    beside, alone, small = (memory._bytes(rows, 13, pages=pages) for rows, pages in ((7, True), (7, False), (3, False)))
    assert (beside, alone, small) == (103_000, 95_000, 43_000)  # 91 or 39 tokens, adapters, 8000 of state
    model = qc.prepare(dense, CONFIG).train()
    batch = make_batch(7, [11, 2, 4, 5, 12, 1, 3])
    wanted = gradients_of(model, [batch])
    for budget, seen, words in (
        (beside, [91], ""),
        (alone, [91], "the optimizer's pages are on the host meanwhile"),
        (small, [39, 39, 13], "split into micro-batches of at most 3, the optimizer's pages are on the host"),
    ):
        memory.budget = budget
        memory._known.clear()
        tight, told = Tight(model, 91), list[str]()
        optimizer = qc.PagedAdamW(trainable_parameters(model).values(), device_budget="1MiB")
        step = TrainStep(tight, optimizer, max_grad_norm=0.0, memory=memory, notice=told.append)
        found: dict[str, torch.Tensor] = {}
        keep = lambda *_, found=found: found.update({n: p.grad.clone() for n, p in trainable_parameters(model).items()})
        optimizer.register_step_pre_hook(keep)
        step([batch], lr=0.0)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()))
        assert tight.seen == seen and len(told) == bool(words) and all(words in text for text in told)
        step([batch], lr=0.0)
        assert len(told) == bool(words) and (optimizer.statistics().moved_out_bytes > 0) == bool(words)
    with pytest.raises(
        MemoryBudgetError, match=r"One sequence of 13 tokens takes about .*, more than the memory budget"
    ):
        memory.budget = 8192
        memory.room(2, 13)


def test_other_errors_pass(model: nn.Module) -> None:
    class Broken(nn.Module):
        def forward(self, **_: Any) -> Any:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        TrainStep(Broken(), make_optimizer(model), max_grad_norm=0.0)([make_batch(2, [3, 3])], lr=0.0)


def test_what_steps_in_backward_takes_one_batch_and_no_clipping(model: nn.Module) -> None:
    optimizer = qc.PagedAdamW(trainable_parameters(model).values(), step_in_backward=True)
    with pytest.raises(ConfigError, match="does not go with clipping by the global norm"):
        TrainStep(model, optimizer, max_grad_norm=0.3)
    step = TrainStep(model, optimizer, max_grad_norm=0.0)
    before = {name: p.detach().clone() for name, p in step.parameters.items()}
    result = step([make_batch(2, [3, 5])], lr=1e-2)
    assert not result.skipped and all(not torch.equal(p, before[name]) for name, p in step.parameters.items())
    with pytest.raises(ConfigError, match="one batch a step: set grad_accum to 1"):
        step([make_batch(2, [3, 5])] * 2, lr=1e-2)
    assert math.isnan(result.grad_norm)  # nobody has seen all gradients
    step.call = Poisoned(model, [float("nan")] * 5)
    assert [step([make_batch(2, [3, 5])], lr=1e-2).skipped for _ in range(4)] == [True] * 4
    with pytest.raises(NonFiniteError, match=r"5 steps in a row .* of model\..*lora_[AB]"):
        step([make_batch(2, [3, 5])], lr=1e-2)
