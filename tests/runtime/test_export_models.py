"""Export of other bases: Conv1D, tied heads, modules trained in full, GGUF, models in memory; and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import SINGLE_FILE, open_checkpoint
from qlora_compile.runtime.formats.peft_files import PREFIX, write_adapter

MakeModel = Callable[..., torch.nn.Module]
MakeAdapter = Callable[..., Path]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key) for key in checkpoint.specs}


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_base(path: Path, model: torch.nn.Module, **options: Any) -> Path:
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path


@pytest.mark.parametrize("precision", ["original", "dequantized"])
def test_conv1d_of_gpt2(tmp_path: Path, precision: str, make_adapter: MakeAdapter) -> None:
    """[in, out] weights, one of them square; the checkpoint's keys lack the model's prefix, as on the hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=36, n_layer=2, n_head=3, vocab_size=97, n_positions=32, n_inner=60)
    model = transformers.GPT2LMHeadModel(config)
    save_base(tmp_path / "base", model)
    tensors = load_file(tmp_path / "base" / SINGLE_FILE)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "base" / SINGLE_FILE, metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", model, targets=("c_attn", "c_proj"), fan_in_fan_out=True)
    result = export(tmp_path / "base", tmp_path / "out", adapter, precision, verify=True, report=True)
    assert result.verification is not None and result.verification.reference.endswith("stock peft")
    assert {layer.name for layer in result.layers} == {
        f"h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    }
    # fp32: what is left is the order of summation.
    assert result.verification.effect is not None and result.verification.effect > 0.01
    assert result.verification.relative < 1e-5


class TestTied:
    """Head and embedding are one tensor in the base; PEFT computes with two as soon as one of them is trained."""

    def run(
        self, tmp_path: Path, model: torch.nn.Module, make_adapter: MakeAdapter, **adapter: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        base = save_base(tmp_path / "base", model)
        assert "lm_head.weight" not in weights_of(base)
        result = export(base, tmp_path / "out", make_adapter(tmp_path / "adapter", model, **adapter), verify=True)
        assert result.verification is not None and result.verification.relative < 1e-5
        assert result.verification.effect is not None and result.verification.effect > 1e-3
        return weights_of(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())

    def test_stays_tied_where_neither_is_trained(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        weights, config = self.run(tmp_path, tiny_llama(), make_adapter)
        assert "lm_head.weight" not in weights and config["tie_word_embeddings"] is True

    def test_head_with_an_adapter_is_untied(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        model = tiny_llama()
        weights, config = self.run(tmp_path, model, make_adapter, targets=("q_proj", "lm_head"))
        assert torch.equal(weights["model.embed_tokens.weight"], model.state_dict()["model.embed_tokens.weight"])
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert config["tie_word_embeddings"] is False

    def test_embedding_with_an_adapter_leaves_the_head(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        model = tiny_llama()
        weights, config = self.run(tmp_path, model, make_adapter, targets=("embed_tokens",))
        assert torch.equal(weights["lm_head.weight"], model.state_dict()["lm_head.weight"])
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert config["tie_word_embeddings"] is False

    def test_both_trained_in_full_and_equal_stay_tied(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        model = tiny_llama()
        new = torch.randn(model.state_dict()["lm_head.weight"].shape)
        both = {f"{PREFIX}{name}.weight": new.clone() for name in ("lm_head", "model.embed_tokens")}
        weights, config = self.run(
            tmp_path, model, make_adapter, extra=both, modules_to_save=["lm_head", "model.embed_tokens"]
        )
        assert "lm_head.weight" not in weights and torch.equal(weights["model.embed_tokens.weight"], new)
        assert config["tie_word_embeddings"] is True


def test_modules_trained_in_full_replace_or_mix(
    tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
) -> None:
    model = tiny_llama()
    base = save_base(tmp_path / "base", model)
    new = {f"{PREFIX}model.norm.weight": torch.rand(48) + 0.5}
    adapter = make_adapter(tmp_path / "adapter", model, extra=new, modules_to_save=["model.norm"])
    export(base, tmp_path / "whole", adapter, verify=True)
    old, got = model.state_dict()["model.norm.weight"], weights_of(tmp_path / "whole")["model.norm.weight"]
    assert torch.equal(got, new[f"{PREFIX}model.norm.weight"])
    export(base, tmp_path / "half", {adapter: 0.25}, verify=True)
    got = weights_of(tmp_path / "half")["model.norm.weight"]
    # One rounding from fp64.
    assert torch.equal(got, (0.75 * old.double() + 0.25 * new[f"{PREFIX}model.norm.weight"].double()).float())


def test_a_gguf_base_is_unpacked_first(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: MakeAdapter
) -> None:
    """Only the door: that GGUF files are read right is the loader's test."""
    asked: list[Path] = []

    def materialize(path: Path, out: Path, dtype: torch.dtype | None) -> Path:
        asked.append(path)
        assert dtype is None  # nothing is rounded
        export(tiny_checkpoint, out)
        return out

    monkeypatch.setattr("qlora_compile.runtime.models.materialize", materialize)
    (tmp_path / "model.gguf").touch()
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    export(tmp_path / "model.gguf", tmp_path / "a", adapter, verify=True)
    export(tiny_checkpoint, tmp_path / "b", adapter)
    assert asked == [tmp_path / "model.gguf"]
    assert (tmp_path / "a" / SINGLE_FILE).read_bytes() == (tmp_path / "b" / SINGLE_FILE).read_bytes()


MEASURE = """
import sys
from pathlib import Path
from qlora_compile.runtime.export import export

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

small, small_adapter, base, adapter, out = map(Path, sys.argv[1:])
export(small, out / "warm", small_adapter)  # what a first call leaves behind is not what is measured
before, seen = anonymous_bytes(), []
export(base, out / "big", adapter, progress=lambda done, total: seen.append(anonymous_bytes()))
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see anonymous memory")
def test_memory_is_a_few_tensors_whatever_the_size_of_the_base(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    """In a process of its own: what this one has freed before would be used again and not be seen."""
    count, shape = 30, (1021, 2050)
    keys = [f"layers.{i:02d}.weight" for i in range(count)]
    base = tmp_path / "base"
    base.mkdir()
    save_file({key: torch.randn(shape).bfloat16() for key in keys}, base / SINGLE_FILE)
    factors = {"A": torch.randn(2, shape[1]), "B": torch.randn(shape[0], 2)}
    tensors = {
        f"{PREFIX}{key.removesuffix('.weight')}.lora_{x}.weight": t.clone() for key in keys for x, t in factors.items()
    }
    adapter = write_adapter(tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "target_modules": ["x"]}, tensors)
    small = make_adapter(tmp_path / "small", load(tiny_checkpoint))
    paths = map(str, (tiny_checkpoint, small, base, adapter, tmp_path))
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    tensor_bytes, base_bytes = 2 * shape[0] * shape[1], 2 * shape[0] * shape[1] * count
    # A tensor, its result, and what the allocator has not returned yet: 9 tensors' size was measured. All would be 30.
    assert tensor_bytes < int(done.stdout) < base_bytes / 2
