"""`save_pretrained` of a prepared model: its adapters, and one sentence for what cannot be written."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

import qlora_compile as qc
from qlora_compile.errors import ConfigError, ModelStateError

pytest.importorskip("transformers")
OPTIONS = {"r": 3, "init_lora_weights": False, "lowering": "eager"}
IDS = torch.arange(22).reshape(2, 11)


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return qc.prepare(tiny_llama(num_hidden_layers=1), OPTIONS)


def test_it_writes_the_adapters(model: Any, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    traced = qc.prepare(tiny_llama(num_hidden_layers=1), OPTIONS, example_inputs={"input_ids": IDS, "labels": IDS})
    for number, made in enumerate([model, traced, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]):
        made.save_pretrained(tmp_path / str(number))
        files = sorted(file.name for file in (tmp_path / str(number)).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors", "model.safetensors", "qlora_compile.json"]
        for name in files:
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()
    assert type(model).__name__ == "LlamaForCausalLM"


def test_further_adapters_have_folders(model: Any, tmp_path: Path) -> None:
    qc.load_adapter(model, qc.save_adapter(model, tmp_path / "a"), "org/law")
    model.save_pretrained(tmp_path / "all")
    again = load_file(tmp_path / "all" / "org_law" / "adapter_model.safetensors")
    first = load_file(tmp_path / "all" / "adapter_model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def test_what_trains_is_read_back(model: Any, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    other = qc.prepare(tiny_llama(num_hidden_layers=1), {**OPTIONS, "seed": 5})
    found = other.load_state_dict(state, strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    part = dict(list(state.items())[1:])
    assert next(iter(state)) in other.load_state_dict(part, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(part)


def test_what_cannot_be_written_is_one_sentence(model: Any, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uploads nothing"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()
    quantized = qc.prepare(tiny_llama(num_hidden_layers=1), {"r": 0})
    plain = tiny_llama(num_hidden_layers=1)
    torch.compile(plain, backend="qlora", options=OPTIONS)(input_ids=IDS, labels=IDS)
    for write in (
        lambda: quantized.save_pretrained(tmp_path / "quantized"),
        lambda: plain.save_pretrained(tmp_path / "plain"),
        lambda: save_model(model, str(tmp_path / "model.safetensors")),
        lambda: save_file(model.state_dict(), tmp_path / "state.safetensors"),
    ):
        with pytest.raises(ModelStateError, match=r"4-bit weight .*save_adapter.*torch.save.*export"):
            write()
