"""Exports of mixtures of experts: adapters folded into the tensors that a checkpoint holds, whatever their layout."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora_compile as qc
from qlora_compile.modules import adapter_sites
from qlora_compile.runtime.combine import checked_options, combine_layers
from qlora_compile.runtime.expert_layout import ExpertLayout, _read_probe
from qlora_compile.runtime.formats.peft_files import LoraLayer

transformers = pytest.importorskip("transformers")

OPTIONS = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 6}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},  # on the disk: an expert's w1, w2 and w3
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "head_dim": 14},
    "gpt_oss": {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 14,
        "sliding_window": 8,
    },  # as in the model
    "granitemoe": {"num_local_experts": 3},  # all experts in one tensor of another name
}
# fp32 through two layers; the fold rounds once, we add to the result
TOLERANCE = {"atol": 2e-5, "rtol": 1e-3}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **(SIZES | MODELS[name]))
    )
    return model.float().eval()


@pytest.mark.parametrize("base_precision", ["original", "dequantized"])
@pytest.mark.parametrize("name", MODELS)
def test_the_merged_folder_computes_what_the_model_computed(name: str, base_precision: str, tmp_path: Path) -> None:
    plain = build(name)
    plain.save_pretrained(tmp_path / "base")
    model = qc.prepare(plain, OPTIONS | {"quantize": base_precision == "dequantized"})
    with torch.no_grad():
        for site in adapter_sites(model).values():
            site.b().normal_(std=0.05)
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    qc.save_adapter(model, tmp_path / "adapter")
    report = qc.export(
        tmp_path / "base", tmp_path / "merged", [tmp_path / "adapter"], base_precision, verify=True, report=True
    )
    assert report.verification is not None and max(layer.relative for layer in report.layers) < 1e-6
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert base.keys() == merged.keys()
    experts = [key for key in base if re.search(r"[.]experts[.](?!.*bias)|_linear[.]", key)]
    assert len(experts) >= 4 and all(not torch.equal(base[key], merged[key]) for key in experts)
    loaded = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, **TOLERANCE)


def test_a_prepared_model_exports_itself(tmp_path: Path) -> None:
    model = qc.prepare(build("mixtral"), OPTIONS)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            site.b().normal_(std=0.05)
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    qc.export(model, tmp_path / "merged", base_precision="dequantized")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, **TOLERANCE)


def test_what_a_checkpoint_holds_of_an_expert() -> None:
    layout = ExpertLayout(build("mixtral").config.to_dict() | {"architectures": ["MixtralForCausalLM"]})
    held = layout.tensors("model.layers.1.mlp.experts.gate_up_proj")
    assert len(held) == 6
    rows = held["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert rows.expert == 2 and torch.equal(rows.rows, torch.arange(76, 152)) and not rows.transposed
    assert {key for key, _, _ in rows.siblings} == {
        f"model.layers.1.block_sparse_moe.experts.2.{w}.weight" for w in ("w1", "w3")
    }


def test_experts_in_one_tensor_of_another_name() -> None:
    layout = ExpertLayout(build("granitemoe").config.to_dict() | {"architectures": ["GraniteMoeForCausalLM"]})
    [(key, held)] = layout.tensors("model.layers.0.block_sparse_moe.experts.gate_up_proj").items()
    assert key == "model.layers.0.block_sparse_moe.input_linear.weight"
    assert held.expert is None and not held.transposed and torch.equal(held.rows, torch.arange(152))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_probe_is_read_only_where_it_is_understood(transposed: bool) -> None:
    numbers = torch.arange(30.0).view(3, 1, 10).repeat(1, 2, 1)
    numbers = numbers if transposed else numbers.mT.contiguous()
    held = _read_probe("experts.up_proj", False, 10, numbers)
    assert held is not None and held.transposed == transposed
    a, b = torch.randn(3, 2, 5), torch.randn(3, 10, 2)
    assert all(torch.equal(one, two) for one, two in zip(held.own_part(a, b), (a, b), strict=True))
    assert _read_probe("experts.up_proj", False, 10, numbers.flip(0)) is None  # experts in another order
    mixed = numbers.clone()
    mixed[1] = numbers[1].roll(1, dims=-1 if transposed else 0)
    assert _read_probe("experts.up_proj", False, 10, mixed) is None  # not the same rows of all
    assert (
        _read_probe("experts.up_proj", False, 10, torch.arange(30.0).repeat(2, 1)) is None
    )  # several experts in a matrix
    assert _read_probe("experts.up_proj", False, 10, torch.arange(20.0).view(2, 10)) is None  # columns that differ


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_combined_adapters_of_experts(method: str, tmp_path: Path) -> None:
    """By `svd` of the whole rank nothing is lost either."""
    folders = {}
    for number, weight in ((1, 0.7), (2, -0.4)):
        model = qc.prepare(build("mixtral"), OPTIONS | {"seed": number, "quantize": False})
        with torch.no_grad():
            for site in adapter_sites(model).values():
                site.b().normal_(std=0.05)
        qc.save_adapter(model, tmp_path / str(number))
        folders[tmp_path / str(number)] = weight
    from qlora_compile.runtime.combine_folders import combine_folders

    combine_folders(folders, tmp_path / "both", method=method, **({"rank": 6} if method == "svd" else {}))
    model = qc.prepare(build("mixtral"), OPTIONS | {"r": 0, "quantize": False})
    qc.load_adapter(model, tmp_path / "both", "both")
    ids = torch.randint(3, 99, (2, 11))
    with torch.no_grad():
        got = model(input_ids=ids).logits
    build("mixtral").save_pretrained(tmp_path / "base")
    qc.export(tmp_path / "base", tmp_path / "merged", folders)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(got, merged(input_ids=ids).logits, **TOLERANCE)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "sequential", "ties", "dare"])
def test_every_way_to_combine_takes_each_expert_for_itself(method: str) -> None:
    a, b = (LoraLayer(torch.randn(3, 2, 14), torch.randn(3, 9, 2), 4.0, 2.0) for _ in "ab")
    options = checked_options(method, None, 1.0, "total")

    def combine(**parts: LoraLayer) -> LoraLayer:
        layers = {label: {"up": layer} for label, layer in parts.items()}
        return combine_layers("new", layers, {"a": 0.5, "b": 0.25}, method, options, 0, torch.float32)[0]["up"]

    together = combine(a=a, b=b)
    assert together.experts == 3
    for expert in range(3):
        alone = combine(**{k: replace(v, a=v.a[expert], b=v.b[expert]) for k, v in {"a": a, "b": b}.items()})
        want, got = alone.b @ alone.a, together.b[expert] @ together.a[expert]
        torch.testing.assert_close(got * together.scaling, want * alone.scaling, atol=1e-5, rtol=1e-4)
