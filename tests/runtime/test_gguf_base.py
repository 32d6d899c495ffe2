"""A GGUF file as what an export, a conversion or a run starts from: all of its values, or a sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_compile.errors import CheckpointError
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats import gguf_files
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.formats.gguf_rope import read_rope
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


LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5},
    "yarn": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "Llama 3.1": LLAMA_31 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    "Llama 3.2": LLAMA_31 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "short": LLAMA_31 | {"factor": 8.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_scaling_comes_back(tmp_path: Path, kind: str, head_dim: int) -> None:
    base = save_family(tmp_path / "base", "Llama", rope_parameters=ROPES[kind], head_dim=head_dim)
    export(base, tmp_path / "out.gguf", format="gguf", dtype="f32", verify=True)
    found = empty_model(tmp_path / "out.gguf").config.rope_parameters
    assert {name: value for name, value in found.items() if value is not None} == ROPES[kind]
    ids = torch.randint(0, 200, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (load_weights(path, torch.float32)(ids).logits for path in (base, tmp_path / "out.gguf"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)  # fp32, sums of one order


def _reader(factors: list[float] | None = None, **scaling: Any) -> Any:
    fields = {f"arch.rope.scaling.{name}": SimpleNamespace(contents=lambda v=v: v) for name, v in scaling.items()}
    tensors = [SimpleNamespace(name="rope_freqs.weight", data=np.array(factors, np.float32))] if factors else []
    return SimpleNamespace(fields=fields, tensors=tensors)


def test_what_transformers_knows_of_a_rotary_embedding_stays() -> None:
    linear = {"type": "linear", "factor": 8.0}
    # Gemma 3's, by kind of layer: only full attention is scaled; StableLM's with a part of each head
    by_layer = {
        kind: {"rope_type": "default", "rope_theta": t}
        for kind, t in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    got = read_rope(_reader(**linear), by_layer)
    assert got == by_layer | {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    assert read_rope(_reader(**linear), part) == part | {"rope_type": "linear", "factor": 8.0}
    # Gemma 4's: what no frequency turns is divided by 1e30
    own = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default"},
    }
    assert read_rope(_reader([1.0] * 8 + [1e30] * 8), own) == own
    with pytest.raises(CheckpointError, match="rotary scaling 'longrope' is none that"):
        read_rope(_reader(type="longrope"), part)


def test_factors_that_are_not_llama_31s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_family(tmp_path / "base", "Llama", rope_parameters=ROPES["Llama 3.1"], head_dim=64)
    with monkeypatch.context() as patch:
        other = np.linspace(1, 3, 32, dtype=np.float32)  # as Phi's are, by frequency
        patch.setattr(gguf_files, "rope_factors", lambda config: other)
        export(base, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight are not the factors of Llama 3\.1's rotary scaling"):
        load_weights(tmp_path / "out.gguf")


def test_a_tensor_that_no_model_takes_is_refused(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "Llama", mlp_bias=True)
    export(base, tmp_path / "out.gguf", format="gguf")
    content = (tmp_path / "out.gguf").read_bytes()
    for name in (b"gate", b"down", b"up"):
        content = content.replace(b".ffn_" + name + b".bias", b".ffn_" + name[:-1] + b"x.bias")
    (tmp_path / "out.gguf").write_bytes(content)
    message = (
        r"out\.gguf holds 6 tensors that transformers' LlamaForCausalLM has no place for, for example blk\.0\.ffn_dowx"
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "out.gguf")
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / "out.gguf", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out.gguf"]
