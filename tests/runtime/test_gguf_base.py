"""A GGUF file as what an export, a conversion or a run starts from: all of its values, or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.errors import CheckpointError
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.models import empty_model, load_weights

from .gguf_models import save_family

pytest.importorskip("gguf")
BIASES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Llama, attention": {"attention_bias": True},
    "Llama, MLP": {"mlp_bias": True},
    "Qwen3": {"attention_bias": True},
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key).clone() for key in checkpoint.specs}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_come_back(tmp_path: Path, kind: str) -> None:
    base = save_family(tmp_path / "base", kind.partition(",")[0], **BIASES[kind])
    export(base, tmp_path / "out.gguf", format="gguf", dtype="f32", verify=True)
    export(tmp_path / "out.gguf", tmp_path / "back", dtype="float32")
    before, after = weights_of(base), weights_of(tmp_path / "back")
    assert before.keys() == after.keys() and any(key.endswith("proj.bias") for key in before)
    assert all(torch.equal(after[key], before[key].float()) for key in before)
    described = {name: tuple(p.shape) for name, p in empty_model(tmp_path / "out.gguf").named_parameters()}
    assert described == {name: tuple(p.shape) for name, p in load_weights(tmp_path / "out.gguf").named_parameters()}


@pytest.mark.parametrize("stored", ["f16", "bf16", "f32", "q8_0"])
def test_nothing_is_rounded_before_the_dtype_asked_for(tmp_path: Path, stored: str) -> None:
    import gguf

    own = {"f16": torch.float16, "bf16": torch.bfloat16}.get(stored, torch.float32)
    base = save_family(tmp_path / "base", "Llama", dtype=own)
    export(base, tmp_path / "out.gguf", format="gguf", dtype=stored)
    from transformers import AutoModelForCausalLM, GgufConfig

    unpacked = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", **unpacked).state_dict()
    for dtype in (None, "float32", "float16", "bfloat16"):
        export(tmp_path / "out.gguf", tmp_path / "back", dtype=dtype, overwrite=True)
        got, wanted = weights_of(tmp_path / "back"), getattr(torch, dtype) if dtype else own
        assert {tensor.dtype for tensor in got.values()} == {wanted}
        assert all(torch.equal(got[key], exact[key].to(wanted)) for key in got)
    export(tmp_path / "out.gguf", tmp_path / "again.gguf", format="gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert kinds == {"F32", "F32" if stored == "q8_0" else stored.upper()}


def test_vectors_with_more_digits_than_the_matrices_keep_them(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "Qwen2", dtype=torch.float32)
    export(base, tmp_path / "out.gguf", format="gguf", dtype="f16")
    export(tmp_path / "out.gguf", tmp_path / "back")
    before, after = weights_of(base), weights_of(tmp_path / "back")
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor if tensor.dim() == 1 else tensor.half()), key
    assert all(after[key].dtype == (torch.float32 if before[key].dim() == 1 else torch.float16) for key in after)


def test_a_tensor_that_no_model_takes_is_refused(tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    base = save_family(tmp_path / "base", "Llama", rope_parameters=rope)
    export(base, tmp_path / "out.gguf", format="gguf")
    message = r"out\.gguf holds 1 tensors that transformers' LlamaForCausalLM has no place for, for example rope_freqs"
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "out.gguf")
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "out.gguf", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.gguf"]
