"""`dense_modules`: targets whose weight stays dense under its adapter, through both doors, and chosen by a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile import cli
from qlora_compile.errors import ConfigError
from qlora_compile.numerics import layer_errors, with_dense_layers

DENSE = ("q_proj", "model.layers.1.mlp.down_proj")
OPTIONS: dict[str, Any] = {"r": 3, "block_size": 32, "lowering": "aot_eager", "compute_dtype": "float32"}


def _weights(model: nn.Module) -> dict[str, bool]:
    return {linear.name: linear.bits < 16 for linear in qc.explain(model).linears}


def test_both_doors_leave_the_same_weights_dense(tiny_llama: Callable[..., nn.Module]) -> None:
    tokens = torch.randint(3, 211, (2, 13))
    batch = {"input_ids": tokens, "labels": tokens}
    prepared = qc.prepare(tiny_llama(), OPTIONS | {"dense_modules": DENSE})
    found = _weights(prepared)
    dense = {name for name, quantized in found.items() if not quantized}
    assert dense == {*(f"model.layers.{i}.self_attn.q_proj" for i in range(3)), "model.layers.1.mlp.down_proj"}
    assert len(found) == 21 and all(linear.rank for linear in qc.explain(prepared).linears)
    plain = tiny_llama()
    for model in (prepared, plain):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    compiled = torch.compile(plain, backend="qlora", options=OPTIONS | {"dense_modules": DENSE})
    compiled(**batch).loss.backward()
    assert _weights(plain) == found
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:  # now that they exist
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
            parameter.grad = None
    eager = prepared(**batch).loss
    eager.backward()
    loss = compiled(**batch).loss
    loss.backward()
    # fp32, sums in another order
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(plain.named_parameters(), prepared.parameters(), strict=True):
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    groups = {linear.name: linear.group for linear in qc.explain(plain).linears}
    assert groups["model.layers.0.self_attn.q_proj"] == ()  # not with k and v, which are quantized
    assert len(groups["model.layers.0.self_attn.k_proj"]) == 2


def test_a_trace_knows_of_them(tiny_llama: Callable[..., nn.Module]) -> None:
    tokens = torch.zeros(2, 24, dtype=torch.long)
    config = qc.QLoRAConfig(r=3, block_size=32, dense_modules=("model.layers.3.mlp.up_proj",))
    report = qc.trace(tiny_llama(num_hidden_layers=9), {"input_ids": tokens, "labels": tokens}, config)
    assert [linear.name for linear in report.linears if linear.bits >= 16] == ["model.layers.3.mlp.up_proj"]


def test_a_budget_chooses_them(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    config = qc.QLoRAConfig(r=3, block_size=32, dense_modules=("model.layers.2.self_attn.o_proj",))
    chosen = with_dense_layers(model, config, 6.0)
    suggested = {layer.name for layer in layer_errors(model, config, 6.0) if layer.dense}
    assert suggested and set(chosen.dense_modules) == suggested | {"model.layers.2.self_attn.o_proj"}
    qc.prepare(model, chosen)
    assert {name for name, quantized in _weights(model).items() if not quantized} == set(chosen.dense_modules)
    with pytest.raises(ConfigError, match="below what the format alone takes"):
        with_dense_layers(tiny_llama(), config, 4.0)


def test_finetune_keeps_them_dense_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    line = f"finetune --model {tiny_checkpoint} --data {tmp_path}/t.txt --out {tmp_path}/run --seq-len 13 --no-compile"
    line += " --dense-layers auto --bits 6 --r 3"
    assert cli.main([*line.split(), "--steps", "2"]) == 0
    assert "layers stay dense within 6 bits a weight: model.layers." in capsys.readouterr().err
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["dense_modules"]
    assert 0 < len(chosen) < 21
    stored = json.loads((tmp_path / "run" / "adapter" / "qlora_compile.json").read_text())
    assert len(stored["weights"]) == 21 - len(chosen) and not {f"{name}.weight" for name in chosen} & {
        *stored["weights"]
    }
    assert cli.main([*line.split(), "--steps", "3", "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dense_modules"] == chosen
    capsys.readouterr()
    for options in ("--dense-layers auto", "--bits 6"):
        wrong = f"finetune --model {tiny_checkpoint} --data {tmp_path}/t.txt --out {tmp_path}/other {options}"
        assert cli.main(wrong.split()) == 2
        assert "--dense-layers auto and --bits go together" in capsys.readouterr().err


def test_wrong_values() -> None:
    with pytest.raises(ConfigError, match="dense_modules"):
        qc.QLoRAConfig(dense_modules=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a regular expression"):
        qc.QLoRAConfig(dense_modules="(")
