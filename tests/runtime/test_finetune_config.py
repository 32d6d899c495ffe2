"""Every value that a training run can be asked for is checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.config import QLoRAConfig
from qlora_compile.errors import ConfigError, MemoryBudgetError, UnknownOptionError
from qlora_compile.runtime.finetune_config import FinetuneConfig

PATHS: dict[str, Any] = {"model": "m", "data": "d.txt", "out": "o"}


def test_paths_and_dtypes_are_parsed() -> None:
    config = FinetuneConfig(**PATHS, eval_data="e.txt", dtype="fp16", resume="o/checkpoints/step-3")
    assert (config.model, config.eval_data) == (Path("m"), Path("e.txt"))
    assert config.resume == Path("o/checkpoints/step-3") and config.base_dtype == torch.float16


def test_dtype_and_seed_follow_the_qlora_config() -> None:
    config = FinetuneConfig(**PATHS, qlora=QLoRAConfig(seed=7, compute_dtype="float32"))
    assert config.base_dtype == torch.float32 and config.data_seed == 7
    assert FinetuneConfig(**PATHS, seed=2, qlora=QLoRAConfig(seed=7)).data_seed == 2


def test_to_dict_is_json() -> None:
    plain = json.loads(json.dumps(FinetuneConfig(**PATHS, dtype="bf16", warmup=5).to_dict()))
    assert plain["model"] == "m" and plain["dtype"] == "bfloat16" and plain["qlora"]["r"] == 16


@pytest.mark.parametrize(
    ("steps", "epochs", "blocks", "wanted"),
    [(7, 1.0, 100, 7), (None, 1.0, 100, 17), (None, 2.5, 100, 42), (None, 0.001, 3, 1)],
)
def test_total_steps(steps: int | None, epochs: float, blocks: int, wanted: int) -> None:
    config = FinetuneConfig(**PATHS, steps=steps, epochs=epochs, batch=3, grad_accum=2)
    assert config.total_steps(blocks) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("data", None),
        ("batch", 0),
        ("batch", 2**63 - 1),
        ("seq_len", 10**20),
        ("eval_every", 5),  # without eval_data
        ("eval_batches", 3),
        ("grad_accum", 1.5),
        ("seq_len", 1),
        ("keep_last", 0),
        ("save_every", -1),
        ("eval_every", True),
        ("steps", 0),
        ("eval_batches", 0),
        ("epochs", 0),
        ("epochs", float("nan")),
        ("lr", 0),
        ("lr", float("inf")),
        ("schedule", "cosin"),
        ("warmup", -1),
        ("warmup", 2.5),
        ("max_grad_norm", -0.1),
        ("weight_decay", "0"),
        ("seed", -1),
        ("resume", 3),
        ("dtype", "int8"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        FinetuneConfig(**(PATHS | {name: value}))


def test_rank_zero_has_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="no adapters to train"):
        FinetuneConfig(**PATHS, qlora=QLoRAConfig(r=0))
    FinetuneConfig(**PATHS, qlora=QLoRAConfig(r=0, rank_pattern={"q_proj": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "for the paged optimizers: choose paged_adamw"),
        ({"grad_accum": 3}, "does not go with accumulation over 3 micro-batches: set grad_accum to 1"),
        ({"max_grad_norm": 0.3}, "does not go with clipping by the global norm: set max_grad_norm to 0"),
        ({"dtype": "float16"}, "does not go with float16, .*: use bfloat16"),
        ({"fsdp": True}, "does not go with fsdp"),
    ],
)
def test_a_step_in_backward_is_refused_with_what_needs_all_gradients(options: dict[str, Any], message: str) -> None:
    fine = {"step_in_backward": True, "optimizer": "paged_adamw", "max_grad_norm": 0.0}
    FinetuneConfig(**PATHS, **fine)
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**(PATHS | fine | options))


HALF = QLoRAConfig(compute_dtype="float16", modules_to_save=("norm",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qlora": QLoRAConfig(compute_dtype="float16", adapter_dtype="float16")}, "adapter_dtype is float16"),
        ({"qlora": HALF}, "modules_to_save are trained in the base model's dtype"),
        (
            {"qlora": QLoRAConfig(modules_to_save=("norm",)), "dtype": "float16"},
            r"use bfloat16, or --dtype float32 \(dtype='float32'\)",
        ),
    ],
)
def test_nothing_trains_in_float16(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**PATHS, **options)
    assert FinetuneConfig(**PATHS, qlora=HALF, dtype="float32").scales_loss
    assert not FinetuneConfig(**PATHS).scales_loss


@pytest.mark.parametrize("out", ["texts/out", "texts", "texts/../texts/deep/out"])
def test_the_output_must_not_lie_in_the_data(out: str) -> None:
    for changes in ({"data": "texts"}, {"eval_data": "texts"}):
        with pytest.raises(ConfigError, match=rf"out \({out}\) lies in {next(iter(changes))} \(texts\)"):
            FinetuneConfig(**PATHS | changes | {"out": out})
    FinetuneConfig(**PATHS | {"data": "run/texts", "out": "run/texts-out"})


@pytest.mark.parametrize("name", ["optimizer_budget", "memory_budget"])
@pytest.mark.parametrize(("value", "message"), [(-5, "the least that works"), ("4x", "must be a number of bytes")])
def test_budgets_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(MemoryBudgetError, match=message):
        FinetuneConfig(**PATHS, optimizer="paged_adamw", **{name: value})
    with pytest.raises(ConfigError, match="memory_budget is for one process"):
        FinetuneConfig(**PATHS, fsdp=True, memory_budget="8GiB")


def test_a_folder_for_pages_needs_a_budget() -> None:
    fine = PATHS | {"optimizer": "paged_adamw", "optimizer_folder": "pages"}
    for budget in ("optimizer_budget", "memory_budget"):
        FinetuneConfig(**fine, **{budget: "1GiB"})
    with pytest.raises(ConfigError, match="set optimizer_budget or memory_budget"):
        FinetuneConfig(**fine)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match="grad_accum"):
        FinetuneConfig.from_options(PATHS | {"grad_acum": 2})


def test_devices() -> None:
    assert FinetuneConfig(**PATHS, device="cpu").pick_device() == torch.device("cpu")
    with pytest.raises(ConfigError, match="'gpu'"):
        FinetuneConfig(**PATHS, device="gpu").pick_device()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            FinetuneConfig(**PATHS, device="cuda:0").pick_device()
