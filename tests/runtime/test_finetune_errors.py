"""Training runs that cannot work: one clear sentence, before anything expensive, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_compile.errors import CheckpointError, ConfigError, DataError, NonFiniteError, NoTargetError, OutputError
from qlora_compile.runtime import finetune as ft
from qlora_compile.runtime.checkpoint import Checkpoint
from qlora_compile.runtime.finetune import FinetuneConfig, finetune
from qlora_compile.runtime.reporters import SilentReporter
from qlora_compile.runtime.run_folder import check_same_settings


def run(config: FinetuneConfig) -> None:
    finetune(config, SilentReporter())


def test_an_output_folder_that_is_not_empty(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ft, "load_tokenizer", lambda path: pytest.fail("nothing may be loaded"))
    config = make_config()
    config.out.mkdir()
    (config.out / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            run(make_config(resume=resume))
    (config.out / "run.json").touch()
    with pytest.raises(OutputError, match="holds a training run: resume it"):
        run(config)
    with pytest.raises(OutputError, match="not a folder"):
        run(make_config(out="out/thesis.tex"))
    with pytest.raises(OutputError, match="cannot be written"):
        run(make_config(out="out/thesis.tex/deeper"))
    assert sorted(p.name for p in config.out.iterdir()) == ["run.json", "thesis.tex"]


def test_a_resumed_run_may_page_elsewhere_but_not_train_other_adapters(make_config: Any, tmp_path: Path) -> None:
    options = {"optimizer": "paged_adamw", "optimizer_budget": "16KiB"}
    checkpoint = Checkpoint(tmp_path, 3, {}, {"config": make_config(**options).to_dict()})
    check_same_settings(make_config(**options | {"optimizer_budget": "8KiB", "optimizer_folder": tmp_path}), checkpoint)
    for changed, message in (
        ({"r": 5}, "r=3, this run has 5"),
        ({"target_modules": "q_proj"}, "target_modules='all-linear'"),
    ):
        with pytest.raises(
            CheckpointError, match=f"was trained with {message}.*give the same value, or start a new run"
        ):
            check_same_settings(make_config(**options, qlora=changed), checkpoint)


def test_bad_data_leaves_no_folder_and_loads_no_model(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ft, "load_weights", lambda *args, **kwargs: pytest.fail("the model must not be loaded"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the lazy dog"}\n{"text": \n')
    config = make_config(data=bad)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        run(config)
    assert not config.out.exists()


def test_a_missing_model_and_a_sequence_too_long_for_it(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder"):
        run(make_config(model=tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="reads at most 256 tokens: give --seq-len 256 or less"):
        run(make_config(seq_len=257))


def test_targets_that_match_nothing_leave_no_run_behind(make_config: Any, texts: Path) -> None:
    config = make_config(eval_data=texts, qlora={"target_modules": ("no_such_layer",)})
    with pytest.raises(NoTargetError, match="no_such_layer"):
        run(config)
    assert not config.out.exists()


def test_numbers_that_stay_nan_end_the_run(make_config: Any) -> None:
    config = make_config(lr=1e18, max_grad_norm=0.0, steps=30, warmup=0)
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        run(config)
    record = json.loads((config.out / "run.json").read_text())
    assert record["status"] == "failed" and "5 steps in a row" in record["error"]
    for line in (config.out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
