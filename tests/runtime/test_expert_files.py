"""Adapters of fused experts in PEFT's files: what we write PEFT loads, what PEFT writes we load, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import AdapterMismatchError, CheckpointError
from qlora_compile.modules import adapter_sites, is_quantized
from qlora_compile.runtime.formats.expert_files import flatten, module_paths, parameter_names, unflatten
from qlora_compile.runtime.formats.peft_files import read_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

OPTIONS = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 6}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_local_experts": 4}
# fp32 through two layers; PEFT adds B A to the weight, we to the result
TOLERANCE = {"atol": 2e-5, "rtol": 1e-3}
MODELS = {"mixtral": {}, "gpt_oss": {"num_experts_per_tok": 2, "head_dim": 14, "sliding_window": 8}}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **(SIZES | MODELS[name]))
    )
    return model.float().eval()


def prepared(name: str, **options: Any) -> nn.Module:
    model = qc.prepare(build(name), OPTIONS | options)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            for adapter in site.adapters:
                site.b(adapter).normal_(std=0.05)
    return model


def four_bit_values(model: nn.Module, name: str) -> nn.Module:
    """A plain model with the 4-bit values of the prepared one, and no adapter."""
    plain, own = build(name), dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            parameter.copy_(own[key].dequantize() if is_quantized(own[key]) else own[key])
    return plain


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_we_save_and_we_load_what_peft_saves(name: str, tmp_path: Path) -> None:
    model = prepared(
        name, rank_pattern={"experts.down_proj": 5}, alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 4}
    )
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    qc.save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    theirs = peft.PeftModel.from_pretrained(four_bit_values(model, name), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, want, **TOLERANCE)

    theirs.save_pretrained(tmp_path / "theirs")
    again = prepared(name, rank_pattern={"experts.down_proj": 5})
    qc.load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, want, **TOLERANCE)
    for key, site in adapter_sites(model).items():
        assert torch.equal(adapter_sites(again)[key].a(), site.a())
        assert torch.equal(adapter_sites(again)[key].b(), site.b())


def test_an_adapter_that_peft_made_from_the_start(tmp_path: Path) -> None:
    """One parameter of the two, named in full in one layer only; then as a second adapter of the model."""
    plain = build("mixtral")
    names = ["model.layers.1.mlp.experts.down_proj"]
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=names))
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    assert list(read_adapter(tmp_path / "theirs").layers()) == names
    ids = torch.randint(3, 99, (2, 11))
    model = qc.prepare(build("mixtral"), OPTIONS | {"quantize": False})
    qc.load_adapter(model, tmp_path / "theirs", "peft")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, **TOLERANCE)


def test_same_adapter_same_bytes(tmp_path: Path) -> None:
    model = prepared("mixtral")
    for folder in ("one", "two"):
        qc.save_adapter(model, tmp_path / folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_dropout_is_not_noted_beside_experts(tmp_path: Path) -> None:
    """peft refuses it beside target_parameters; linears do drop while they train here."""
    qc.save_adapter(prepared("mixtral", lora_dropout=0.2), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["lora_dropout"] == 0
    peft.PeftModel.from_pretrained(build("mixtral"), tmp_path / "ours")


def test_errors_name_the_parameter(tmp_path: Path) -> None:
    qc.save_adapter(prepared("mixtral"), tmp_path / "ours")
    other = qc.prepare(build("mixtral"), OPTIONS | {"rank_pattern": {"experts.down_proj": 4}})
    with pytest.raises(AdapterMismatchError, match=r"experts\.down_proj has rank 4 in the model, 3 in the adapter"):
        qc.load_adapter(other, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="target_parameters names 1"):
        parameter_names(["m.experts", "m.experts.base_layer"], ["experts.down_proj"])


def test_flatten_and_paths() -> None:
    a, b = torch.randn(5, 3, 11), torch.randn(5, 7, 3)
    flat = flatten(a, b)
    assert flat[0].shape == (15, 11) and flat[1].shape == (7, 15)
    assert torch.equal(flat[0][2 * 3 + 1], a[2, 1]) and torch.equal(flat[1][:, 1 * 5 + 2], b[2, :, 1])
    back = unflatten(*flat, 3)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)
    paths = module_paths({"x.experts.gate_up_proj": "gate_up_proj", "x.experts.down_proj": "down_proj"})
    assert paths == {"x.experts.gate_up_proj": "x.experts.base_layer", "x.experts.down_proj": "x.experts"}
    assert parameter_names(paths.values(), ["experts.down_proj", "experts.gate_up_proj"]) == {
        v: k for k, v in paths.items()
    }
