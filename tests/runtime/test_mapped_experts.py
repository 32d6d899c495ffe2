"""Experts that stay in the checkpoint's file until they are quantized: the same model, values and runs as in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import CheckpointError, ModelStateError
from qlora_compile.runtime import finetune as ft
from qlora_compile.runtime.mapped_experts import MappedExperts, join_experts
from qlora_compile.runtime.models import load_weights, model_fingerprint
from qlora_compile.runtime.reporters import SilentReporter

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 72, "moe_intermediate_size": 72, "vocab_size": 101, "head_dim": 16}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
SIZES |= {"num_local_experts": 3, "num_experts": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def _saved(folder: Path, kind: str, **sizes: int) -> Path:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **SIZES | sizes)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def _mapped(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, MappedExperts)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # as stored, and another
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_same_model_before_and_after_prepare(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = _saved(tmp_path / kind, kind)
    plain, mapped = load_weights(folder, dtype), load_weights(folder, dtype, map_experts=True)
    assert len(_mapped(mapped)) == 4 and not _mapped(plain)
    assert model_fingerprint(mapped) == model_fingerprint(plain)
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        assert torch.equal(mapped(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"block_size": 32, "r": 3, "exclude_modules": ["layers.0.mlp.experts.down_proj"]}
    own = dict(qc.prepare(plain, options).named_parameters())
    qc.prepare(mapped, options)
    assert _mapped(mapped) == {"model.layers.0.mlp.experts.down_proj"}
    join_experts(mapped)
    other = dict(mapped.named_parameters())
    assert own.keys() == other.keys()
    for name, parameter in own.items():
        theirs = other[name]
        assert type(theirs) is type(parameter) and theirs.requires_grad == parameter.requires_grad
        if isinstance(parameter, qc.QuantizedTensor):
            assert theirs.layout_4bit == parameter.layout_4bit
            assert all(torch.equal(a, b) for a, b in zip(parameter.data_4bit, theirs.data_4bit) if a is not None)
        else:
            assert torch.equal(parameter, theirs)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_starts_from_the_weight(tmp_path: Path, init: str) -> None:
    folder, options = _saved(tmp_path / "base", "mixtral"), {"block_size": 32, "r": 3, "init_lora_weights": init}
    plain, mapped = load_weights(folder), load_weights(folder, map_experts=True)
    own, other = (dict(qc.prepare(model, options).named_parameters()) for model in (plain, mapped))
    assert all(torch.equal(own[name], other[name]) for name in own) and not _mapped(mapped)


def test_one_matrix_is_read_for_one_matrix_asked_for() -> None:
    read: list[int] = []

    def matrix(expert: int) -> torch.Tensor:
        read.append(expert)
        return torch.full((2, 5), float(expert))

    weight = nn.Parameter(MappedExperts((3, 2, 5), torch.float32, matrix), requires_grad=False)
    assert torch.equal(weight[-1], torch.full((2, 5), 2.0)) and read == [2]
    assert weight.to("meta").shape == (3, 2, 5) and read == [2]
    assert torch.equal(weight.double()[:, 1, 4], torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert read == [2, 0, 1, 2]
    with pytest.raises(IndexError):
        weight[3]
    assert torch.equal(torch.zeros(3, 2, 5).add_(weight)[1], torch.ones(2, 5))
    with pytest.raises(ModelStateError, match="would write"):
        weight.zero_()
    module = nn.Module()
    module.weight = weight
    assert type(module.to("meta").weight) is nn.Parameter


@pytest.mark.parametrize("changed", ["shape", "number"])
def test_a_checkpoint_with_other_experts_than_the_model_is_refused(tmp_path: Path, changed: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = _saved(tmp_path / "base", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.1.block_sparse_moe.experts.2.w{}.weight"
    for part in (1, 2, 3):
        if changed == "number":
            del tensors[key.format(part)]
        else:
            tensors[key.format(part)] = tensors[key.format(part)][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        qc.prepare(load_weights(folder, map_experts=True))


def test_a_run_is_the_same_run(
    tmp_path: Path, make_config: Callable[..., Any], tiny_checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _saved(tmp_path / "base", "mixtral", vocab_size=300)
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, folder)
    kinds: list[int] = []

    def load(path: Path, dtype: torch.dtype, *, map_experts: bool) -> Any:
        model = load_weights(path, dtype, map_experts=map_experts and not kinds)
        kinds.append(len(_mapped(model)))
        return model

    monkeypatch.setattr(ft, "load_weights", load)
    changes = {"model": folder, "eval_data": texts / "b.txt", "steps": 2, "eval_batches": 2}
    one, other = (ft.finetune(make_config(out, **changes), SilentReporter()) for out in ("one", "other"))
    assert kinds == [4, 0]
    assert one.losses == other.losses and one.perplexity_dense == other.perplexity_dense
    assert one.perplexity_quantized == other.perplexity_quantized and one.perplexity == other.perplexity
