"""The examples of Trainer and SFTTrainer train, and leave an adapter that stock peft loads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


def run_example(name: str, args: list[str]) -> int:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(args)


def check(model: Path, out: Path, printed: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    first, last = (float(part.split(" ")[0]) for part in printed.split("loss ")[1].split(" at first, "))
    assert last < first
    base = AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, out / "adapter")
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name)


def test_trainer(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    options = ["--steps", "4", "--length", "16", "--lowering", "eager"]
    paths = ["--model", str(tiny_checkpoint), "--data", str(text), "--out", str(tmp_path / "out")]
    assert run_example("trainer", [*paths, *options]) == 0
    check(tiny_checkpoint, tmp_path / "out", capsys.readouterr().out)
    assert (tmp_path / "out/checkpoints/checkpoint-4/adapter_config.json").exists()
    assert run_example("trainer", [*paths, *options, "--steps", "6", "--resume"]) == 0


def test_sft_trainer(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    chats = tmp_path / "chats.jsonl"
    line = {"messages": [{"role": "user", "content": "the lazy dog"}, {"role": "assistant", "content": "a jug"}]}
    chats.write_text("\n".join([json.dumps(line)] * 8))
    paths = ["--model", str(tiny_checkpoint), "--data", str(chats), "--out", str(tmp_path / "out")]
    assert run_example("sft_trainer", [*paths, "--steps", "4", "--lowering", "eager"]) == 0
    check(tiny_checkpoint, tmp_path / "out", capsys.readouterr().out)
