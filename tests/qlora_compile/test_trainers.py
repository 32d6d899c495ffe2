"""transformers' Trainer and TRL's SFTTrainer on a prepared model that compiles in place: no code of ours in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import ModelStateError
from qlora_compile.modules import adapter_sites

transformers = pytest.importorskip("transformers")
ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def compiled(tiny_llama: Callable[..., Any]) -> Any:
    model = qc.prepare(tiny_llama(torch.bfloat16, num_hidden_layers=1), {"r": 3, "lowering": "aot_eager"})
    model.compile(backend="qlora")
    return model


def check_trained(model: Any, history: list[dict[str, Any]]) -> None:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert all(site.b().abs().sum() > 0 for site in adapter_sites(model).values())  # B starts at zero
    assert {linear.lowering for linear in qc.explain(model).linears} <= {"library_gemm", "fp32_gemm", "fused_fp32"}


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["plain", "autocast"])
def test_trainer(compiled: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    row = torch.randint(0, 211, (12,), generator=torch.Generator().manual_seed(2))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS, **QUIET, **options)
    trainer = transformers.Trainer(
        model=compiled, args=arguments, train_dataset=[{"input_ids": row, "labels": row.clone()}] * 8
    )
    trainer.train()
    check_trained(compiled, trainer.state.log_history)


@pytest.mark.parametrize("init", [True, "pissa"])
def test_trainer_saves_and_resumes(tiny_checkpoint: Path, tmp_path: Path, init: bool | str, caplog: Any) -> None:
    """The checkpoints are PEFT's files, and a run that goes on from one ends with the same bits."""
    peft = pytest.importorskip("peft")
    rows = torch.randint(0, 211, (8, 12), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row.clone()} for row in rows]

    def train(checkpoint: Path | None = None) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
        qc.prepare(model, {"r": 3, "lowering": "eager", "init_lora_weights": init, "modules_to_save": ["norm"]})
        arguments = transformers.TrainingArguments(str(tmp_path), save_steps=1, **ARGUMENTS, **QUIET)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return model

    def trained(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole, resumed = train(), train(tmp_path / "checkpoint-2")
    assert trained(whole).keys() == trained(resumed).keys()
    assert all(torch.equal(p, trained(resumed)[name]) for name, p in trained(whole).items())
    assert "missing keys" not in caplog.text
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(loaded, tmp_path / "checkpoint-3")
    assert torch.equal(loaded.base_model.model.model.norm.weight, whole.model.norm.weight)
    folder = qc.save_adapter(whole, tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "checkpoint-3" / name).read_bytes()
    both = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-3"
    )  # the base that it names, adapted
    assert any("lora_A" in name for name, _ in both.named_parameters())


def test_sft_trainer(compiled: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=32, bf16=False, gradient_checkpointing=False, **ARGUMENTS, **QUIET
    )
    trainer = trl.SFTTrainer(
        model=compiled,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["the quick brown fox jumps over the lazy dog"] * 8}),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_checkpoint),
    )
    trainer.train()
    check_trained(compiled, trainer.state.log_history)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic cache", "static cache"])
def test_generate(tiny_llama: Callable[..., Any], options: dict[str, Any]) -> None:
    model = tiny_llama(torch.float32, num_hidden_layers=1, use_cache=True)
    qc.prepare(model, {"r": 3, "init_lora_weights": False, "compute_dtype": "float32", "lowering": "aot_eager"}).eval()
    ids = torch.randint(3, 211, (2, 7), generator=torch.Generator().manual_seed(3))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.compile(backend="qlora")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, **options), expected)
    assert qc.explain(model).graphs > 0


def test_accelerate_saves_by_save_pretrained(compiled: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="qlora")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(compiled)
    tokens = torch.randint(0, 211, (2, 12))
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    with pytest.raises(
        ModelStateError, match=r"save_pretrained \(in accelerate in the place of accelerator\.save_model"
    ):
        accelerator.save_model(model, str(tmp_path / "base"))
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
