"""Checkpoints whose keys transformers renames while it loads: adapters carry the new names, the files keep the old ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlora_compile as qc
from qlora_compile.modules import adapter_sites
from qlora_compile.runtime.renamed_keys import renamed_keys

FP32 = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5}
OLD, NEW = "vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"


@pytest.fixture
def vit(tmp_path: Path) -> nn.Module:
    """A tiny ViT; its checkpoint, with the names of the hub's, is in tmp_path/base."""
    import transformers

    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=36, intermediate_size=52, num_hidden_layers=1, num_attention_heads=3, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    return model


def test_new_names_lead_to_the_checkpoint_s_keys(vit: nn.Module, tmp_path: Path) -> None:
    keys = load_file(tmp_path / "base" / "model.safetensors").keys()
    found = renamed_keys(vit.config.to_dict() | {"architectures": ["ViTForImageClassification"]}, keys)
    assert found[NEW] == OLD and OLD in keys
    assert set(found) <= set(vit.state_dict()) and len(set(found.values())) == len(found)
    assert renamed_keys({"architectures": ["NoSuchModel"]}, keys) == {} == renamed_keys({}, keys)


@pytest.mark.parametrize("base_precision", ["original", "dequantized"])
def test_export_folds_into_the_old_names(vit: nn.Module, tmp_path: Path, base_precision: str) -> None:
    before = load_file(tmp_path / "base" / "model.safetensors")
    model = qc.prepare(vit, FP32)
    site = adapter_sites(model)["vit.layers.0.attention.q_proj"]
    with torch.no_grad():
        site.b().normal_()
    qc.export(model, tmp_path / "out", None, base_precision, base=tmp_path / "base")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    base = before[OLD] if base_precision == "original" else qc.dequantize_4bit(site.weight).float()
    expected = base + site.scaling() * site.b() @ site.a()
    torch.testing.assert_close(after[OLD], expected.detach(), rtol=1e-6, atol=1e-6)  # fp32, summed in fp64 there
