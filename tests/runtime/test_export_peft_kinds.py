"""Adapters that stock peft writes, of every kind that export folds: DoRA, lora_bias, embeddings, Conv1D, patterns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import AdapterMismatchError
from qlora_compile.runtime.combine_folders import combine_folders
from qlora_compile.runtime.export import export
from qlora_compile.runtime.fold import LoraTerm, fold
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.formats.peft_files import read_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def qwen2(path: Path) -> Path:
    """q, k and v have a bias here."""
    config = transformers.Qwen2Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=97, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    return path


def gpt2(path: Path) -> Path:
    config = transformers.GPT2Config(
        n_embd=36, n_layer=1, n_head=3, vocab_size=97, n_positions=32, tie_word_embeddings=False
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def stock_adapter(base: Path, out: Path, **options: Any) -> nn.Module:
    """An adapter that peft made, with nothing left at zero, saved to `out`; returns peft's merged model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | options))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * (0.5 if "magnitude" in name else 0.2))
    model.save_pretrained(out)
    return model.merge_and_unload()


KINDS = {
    "dora": (qwen2, {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora, Conv1D": (gpt2, {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora, rslora": (qwen2, {"use_dora": True, "use_rslora": True, "target_modules": ["up_proj"]}),
    "lora_bias": (qwen2, {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "lora_bias, Conv1D": (gpt2, {"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "square Conv1D and a linear": (gpt2, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "Conv1D and a linear": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj", "lm_head"]}),
    "dora, square Conv1D and a linear": (gpt2, {"use_dora": True, "target_modules": ["attn.c_proj", "lm_head"]}),
    "bias": (qwen2, {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "embedding": (qwen2, {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": (qwen2, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "patterns": (
        qwen2,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5, r".*layers\.1.*down_proj": 2},
            "alpha_pattern": {"up_proj": 11},
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_fold_is_peft_s_merge(tmp_path: Path, kind: str) -> None:
    make, options = KINDS[kind]
    base = make(tmp_path / "base")
    merged = stock_adapter(base, tmp_path / "adapter", **options)
    result = export(base, tmp_path / "out", tmp_path / "adapter", verify=True, report=True)
    assert result.folded > 0 and result.verification is not None
    ours, theirs = open_checkpoint(tmp_path / "out"), merged.state_dict()
    before, changed = open_checkpoint(base), 0
    for key in ours.specs:
        torch.testing.assert_close(ours.tensor(key), theirs[key], rtol=2e-5, atol=2e-6)  # peft computes in fp32
        changed += not torch.equal(ours.tensor(key), before.tensor(key))
    assert changed >= result.folded - 1  # a norm may keep its ones


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    ("make", "targets"), [(gpt2, ["attn.c_proj"]), (gpt2, ["c_fc", "lm_head"]), (qwen2, ["q_proj", "down_proj"])]
)
def test_the_class_decides_what_is_transposed(
    tmp_path: Path, make: Callable[[Path], Path], targets: list[str], flag: bool
) -> None:
    """One saved flag cannot be right for all modules; peft corrects it by each one's class, and so does the fold."""
    base, adapter = make(tmp_path / "base"), tmp_path / "adapter"
    merged = stock_adapter(base, adapter, target_modules=targets).state_dict()
    saved = json.loads((adapter / "adapter_config.json").read_text()) | {"fan_in_fan_out": flag}
    (adapter / "adapter_config.json").write_text(json.dumps(saved))
    export(base, tmp_path / "out", adapter, verify=True)
    ours = open_checkpoint(tmp_path / "out")
    for key in ours.specs:
        torch.testing.assert_close(ours.tensor(key), merged[key], rtol=2e-5, atol=2e-6)


def test_the_class_of_a_model_in_memory_decides(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2(tmp_path / "base"), dtype=torch.float32)
    qc.prepare(model, {"r": 3, "target_modules": ["attn.c_proj", "lm_head"], "exclude_modules": (), "quantize": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    export(model, tmp_path / "out")
    ids = torch.arange(33).reshape(3, 11) * 5 % 97
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(got(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_against_fp64(transposed: bool) -> None:
    a, b, magnitude = torch.randn(3, 700), torch.randn(500, 3), torch.rand(500) + 0.5  # several blocks of rows
    weight = torch.randn((700, 500) if transposed else (500, 700))
    dense = (weight.t() if transposed else weight).double() + 0.7 * (b.double() @ a.double())
    exact = dense / dense.norm(dim=1, keepdim=True) * magnitude.double()[:, None]
    got = fold(weight, [LoraTerm(a, b, 0.7)], transposed=transposed, magnitude=magnitude)
    got = got.t() if transposed else got
    # Half a unit of fp32, and a little for the order of fp64's sums.
    assert bool(((got.double() - exact).abs() <= 0.5000001 * 2.0**-23 * exact.abs() + 1e-12).all())


def test_what_is_only_folded_says_so(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    base = qwen2(tmp_path / "base")
    dora, bias = tmp_path / "dora", tmp_path / "bias"
    stock_adapter(base, dora, use_dora=True, target_modules=["q_proj"])
    stock_adapter(base, bias, lora_bias=True, target_modules=["q_proj"])
    model = qc.prepare(transformers.AutoModelForCausalLM.from_pretrained(base), {"r": 3, "target_modules": ["q_proj"]})
    for folder, name in ((dora, r"DoRA \(use_dora\)"), (bias, r"lora_B \(lora_bias\)")):
        with pytest.raises(AdapterMismatchError, match=rf"{name}, which can be folded by export only"):
            qc.load_adapter(model, folder)
        with pytest.raises(AdapterMismatchError, match=f"cannot be combined: .*{name}"):
            combine_folders({str(folder): 1.0}, tmp_path / "out")
    with pytest.raises(AdapterMismatchError, match="DoRA, which has no weighted form: give it the weight 1"):
        export(base, tmp_path / "out", {dora: 0.5})
    with pytest.raises(AdapterMismatchError, match="gets a DoRA adapter and another one"):
        export(base, tmp_path / "out", {dora: 1, bias: 1})
    plain = tiny_llama()
    plain.save_pretrained(tmp_path / "llama")
    files = read_adapter(bias)
    assert files.layers()["model.layers.0.self_attn.q_proj"].bias is not None
    with pytest.raises(AdapterMismatchError, match=r"the base has no model\.layers\.0\.self_attn\.q_proj\.bias"):
        small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
        adapter = peft.get_peft_model(small, peft.LoraConfig(r=3, target_modules=["q_proj"]))
        adapter.save_pretrained(tmp_path / "other")
        config = tmp_path / "other" / "adapter_config.json"
        tensors = {**read_adapter(tmp_path / "other").tensors}
        config.write_text(config.read_text().replace('"lora_bias": false', '"lora_bias": true'))
        tensors |= {k.replace("A.weight", "B.bias"): torch.ones(54) for k in list(tensors) if "lora_A" in k}
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "other" / "adapter_model.safetensors")
        export(tmp_path / "llama", tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out").exists()
