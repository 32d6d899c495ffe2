"""A paged optimizer in transformers' Trainer: its pages in the log, and arguments that do not go with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import ConfigError
from qlora_compile.runtime.optimizer import trainable_parameters
from qlora_compile.runtime.trainer_callback import PagingCallback


def trainer(model: nn.Module, folder: Path, optimizer: qc.PagedAdamW, **arguments: Any) -> tuple[Any, PagingCallback]:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, 211, (8, 13), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    callback = PagingCallback(optimizer)
    args = TrainingArguments(**(settings | arguments))
    return Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]), callback


@pytest.mark.parametrize("step_in_backward", [False, True])
def test_what_the_pages_did_is_logged(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, step_in_backward: bool
) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=1), {"r": 3, "compute_dtype": "float32"})
    optimizer = qc.PagedAdamW(
        trainable_parameters(model).values(), lr=1e-3, device_budget="16KiB", step_in_backward=step_in_backward
    )
    run, callback = trainer(model, tmp_path, optimizer, **({"max_grad_norm": 0.0} if step_in_backward else {}))
    run.train()
    first, second = callback.history[:2]
    assert second["paging_moved_bytes"] > 0 and 0 <= second["paging_hit_rate"] <= 1
    assert first["paging_resident_bytes"] + first["paging_paged_bytes"] >= 16 * 1024
    state = optimizer.state_dict()["state"]
    assert len(state) == len(trainable_parameters(model)) and all(int(s["step"]) == 4 for s in state.values())


@pytest.mark.parametrize("first", [False, True])
def test_who_sees_the_numbers(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    import transformers

    seen: list[str] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.extend(name for name in logs if name.startswith("paging"))

    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [Reporter])
    model = qc.prepare(tiny_llama(num_hidden_layers=1), {"r": 3, "compute_dtype": "float32"})
    optimizer = qc.PagedAdamW(trainable_parameters(model).values(), lr=1e-3, device_budget="16KiB")
    run, callback = trainer(model, tmp_path, optimizer, save_strategy="steps", save_steps=4)
    if first:
        run.remove_callback(callback)
        run.callback_handler.callbacks.insert(0, callback)
    run.train()
    assert bool(seen) == first
    lines = [line for line in run.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line, numbers in zip(lines, callback.history):
        assert {name: line[name] for name in numbers if numbers[name] is not None}.items() <= numbers.items()
        assert "paging_moved_bytes" in line
    assert "paging_stall_ms" in (tmp_path / "checkpoint-4/trainer_state.json").read_text(encoding="utf-8")


def test_arguments_that_need_all_gradients_are_refused(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=1), {"r": 3, "compute_dtype": "float32"})
    optimizer = qc.PagedAdamW(trainable_parameters(model).values(), step_in_backward=True)
    with pytest.raises(ConfigError, match=r"max_grad_norm=1\.0: set it to 0"):
        trainer(model, tmp_path, optimizer)[0].train()
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=2: set it to 1"):
        trainer(model, tmp_path, optimizer, max_grad_norm=0.0, gradient_accumulation_steps=2)[0].train()
