"""Command line options -> configurations: same defaults, no field forgotten, lists and pairs read as documented."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile import QLoRAConfig, cli_common, cli_finetune
from qlora_compile.runtime.finetune_config import FinetuneConfig


def _defaults(**given: Any) -> dict[str, Any]:
    """The parameters that typer passes when only `given` were typed."""
    parameters = inspect.signature(cli_finetune.finetune).parameters.values()
    return {p.name: p.default for p in parameters} | {"model": Path("m"), "data": Path("d"), "out": Path("o")} | given


def test_defaults_are_those_of_the_configurations() -> None:
    config = cli_finetune.finetune_config(_defaults())
    # a run from the command line needs no logits: only the loss is read
    qlora = QLoRAConfig(keep_logits=False)
    assert config == FinetuneConfig(model=Path("m"), data=Path("d"), out=Path("o"), seed=0, qlora=qlora)


def test_every_field_of_a_run_has_an_option() -> None:
    options = set(_defaults()) - {"as_json", "resume_from"}
    options |= set(cli_finetune.ADAPTER_FIELDS.values())
    options = {name.rstrip("_") for name in options}
    options |= {"dense_bits", "dense_modules"} if {"dense_layers", "bits"} <= options else set()
    missing = {f.name for f in dataclasses.fields(FinetuneConfig)} - options
    assert missing == {"qlora"}
    missing = {f.name for f in dataclasses.fields(QLoRAConfig)} - options
    # What a library user may want to set, and what the command line decides by itself.
    assert missing <= {
        "init_lora_weights",
        "loftq_iter",
        "quantize",
        "adapter_dtype",
        "dump_dir",
        "outline_layers",
        "kernels",
        "autotune",
    }


def test_options_reach_the_configuration() -> None:
    config = cli_finetune.finetune_config(
        _defaults(
            r=5,
            alpha=7.0,
            dropout=0.1,
            use_rslora=True,
            target_modules="q_proj,mlp.down_proj",
            exclude_modules=r".*\.0\..*",
            modules_to_save="lm_head,embed",
            rank_pattern=["q_proj=3", "a=b=4"],
            alpha_pattern=["q_proj=2.5"],
            quant_type="fp4",
            block_size=128,
            double_quant=False,
            compute_dtype="fp32",
            lowering="eager",
            compile_=False,
            steps=9,
            seed=4,
            resume=True,
        )
    )
    assert config.qlora == QLoRAConfig(
        r=5,
        lora_alpha=7.0,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=("q_proj", "mlp.down_proj"),
        exclude_modules=r".*\.0\..*",
        modules_to_save=("lm_head", "embed"),
        rank_pattern={"q_proj": 3, "a=b": 4},
        alpha_pattern={"q_proj": 2.5},
        quant_type="fp4",
        block_size=128,
        double_quant=False,
        compute_dtype=torch.float32,
        keep_logits=False,
        lowering="eager",
        seed=4,
    )
    assert (config.steps, config.seed, config.compile, config.resume) == (9, 4, False, True)


def test_resume_from_names_a_checkpoint() -> None:
    config = cli_finetune.finetune_config(_defaults(resume_from=Path("run/checkpoints/step-3")))
    assert config.resume == Path("run/checkpoints/step-3")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj, mlp.down_proj,", ("q_proj", "mlp.down_proj")),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"layers\.[0-9]{1,2}\..*", r"layers\.[0-9]{1,2}\..*"),
    ],
)
def test_modules_option(text: str, value: object) -> None:
    assert cli_common.modules_option(text) == value


def test_adapter_weights(tmp_path: Path) -> None:
    assert cli_common.adapter_weights(["a", "b=0.25", "c=-1"]) == {"a": 1.0, "b": 0.25, "c": -1.0}
    odd = tmp_path / "lr=2"
    odd.mkdir()
    assert cli_common.adapter_weights([str(odd), "b"]) == {str(odd): 1.0, "b": 1.0}
    assert cli_common.adapter_weights([f"{odd}=0.5"]) == {str(odd): 0.5}
