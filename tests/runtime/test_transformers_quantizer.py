"""`from_pretrained` into 4 bits: the codes, the way back to disk, bitsandbytes' own folders, and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_compile as qc
from qlora_compile.errors import CheckpointError, ConfigError, ModelStateError
from qlora_compile.runtime.models import load_weights

MakeModel = Callable[..., torch.nn.Module]
IDS = torch.arange(33).reshape(3, 11) * 5 % 97
MODEL_FILE = "model.safetensors"


def load(folder: Path, config: Any = None, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"dtype": "auto", "local_files_only": True} | options
    if config is not None:  # an explicit None would hide what the folder's config.json says
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def bitsandbytes_folder(path: Path, dense: Path, quant_type: str, double_quant: bool, **options: Any) -> Path:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **options,
    )
    load(dense, config).save_pretrained(path)
    return path


def test_weights_are_those_of_quantize_4bit_and_the_rest_stays(tmp_path: Path, tiny_llama: MakeModel) -> None:
    dense = tiny_llama(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")  # type: ignore[operator]
    config = qc.QLoRAQuantizationConfig("fp4", block_size=128, double_quant=False, skip_modules=["o_proj"])
    model = load(tmp_path / "dense", config)
    own = dict(model.named_parameters())
    for name, weight in dense.named_parameters():
        if "_proj" in name and "o_proj" not in name:
            wanted = qc.quantize_4bit(weight, quant_type="fp4", block_size=128, double_quant=False)
            assert torch.equal(own[name].codes, wanted.codes) and torch.equal(own[name].absmax, wanted.absmax)
        else:
            assert not isinstance(own[name], qc.QuantizedTensor) and torch.equal(own[name], weight)
    assert not any(p.requires_grad for p in own.values() if isinstance(p, qc.QuantizedTensor))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_bytes_are_those_of_bitsandbytes_both_ways(
    tmp_path: Path, tiny_llama: MakeModel, quant_type: str, double_quant: bool
) -> None:
    # rows of whole blocks, and a multiple of 32 of them: bitsandbytes' kernels for AVX-512 are wrong for, or refuse, others
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llama(torch.bfloat16, **sizes, **heads).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    theirs = bitsandbytes_folder(tmp_path / "theirs", tmp_path / "dense", quant_type, double_quant)
    ours = load(tmp_path / "dense", qc.QLoRAQuantizationConfig(quant_type, double_quant=double_quant))
    ours.save_pretrained(tmp_path / "ours")
    read = load(theirs, qc.QLoRAQuantizationConfig())  # the folder's own choices hold, nothing is quantized again
    assert torch.equal(logits(read), logits(ours))
    read.save_pretrained(tmp_path / "again")
    wanted = load_file(theirs / MODEL_FILE)
    for folder in ("ours", "again"):
        got = load_file(tmp_path / folder / MODEL_FILE)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    saved, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", theirs))
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "quant_method"):
        assert saved["quantization_config"][key] == original["quantization_config"][key]
    stock = load(tmp_path / "ours")  # by bitsandbytes: no class of ours is named
    assert type(stock.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    torch.testing.assert_close(logits(stock), logits(ours), rtol=0.05, atol=0.02)  # bf16 sums in another order


def test_conv1d_and_other_storage(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=3, vocab_size=101)).save_pretrained(tmp_path / "dense")
    theirs = bitsandbytes_folder(
        tmp_path / "theirs", tmp_path / "dense", "nf4", True, bnb_4bit_quant_storage=torch.bfloat16
    )
    ours = load(tmp_path / "dense", qc.QLoRAQuantizationConfig())
    read = load(theirs, qc.QLoRAQuantizationConfig())
    weight = read.transformer.h[0].attn.c_attn.weight
    assert weight.transposed and weight.shape == (48, 144)
    assert torch.equal(weight.codes, ours.transformer.h[0].attn.c_attn.weight.codes)
    assert torch.equal(logits(read), logits(ours))


def test_a_loaded_model_is_prepared_trained_saved_and_read_again(tmp_path: Path, tiny_llama: MakeModel) -> None:
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    model = load(tmp_path / "dense", qc.QLoRAQuantizationConfig())
    model.save_pretrained(tmp_path / "nf4")
    before = logits(model)
    qc.prepare(model, {"r": 3})
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 42 and all(p.grad is not None for p in trained)
    model.save_pretrained(tmp_path / "adapters")
    assert set(load_file(tmp_path / "adapters" / MODEL_FILE)) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    # The program's own loader takes the folder too, in any dtype: codes stay, what they stand for follows.
    again = load_weights(tmp_path / "nf4", torch.float32)
    weight = again.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == torch.float32 and torch.equal(weight.codes, model.model.layers[1].mlp.down_proj.weight.codes)
    torch.testing.assert_close(logits(again), before.float(), rtol=0.05, atol=0.03)  # fp32 against bf16


def test_what_cannot_be_read_is_named(tmp_path: Path, tiny_llama: MakeModel) -> None:
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="did you mean 'double_quant'"):
        qc.QLoRAQuantizationConfig(double_quants=True)
    with pytest.raises(ConfigError, match="block_size must be one of"):
        qc.QLoRAQuantizationConfig(block_size=48)
    config_file = tmp_path / "dense" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ConfigError, match="already quantized by gptq"):
        load(tmp_path / "dense", qc.QLoRAQuantizationConfig())
    config_file.write_text(json.dumps(config))
    load(tmp_path / "dense", qc.QLoRAQuantizationConfig()).save_pretrained(tmp_path / "nf4")
    tensors = load_file(tmp_path / "nf4" / MODEL_FILE)
    key = "model.layers.0.mlp.up_proj.weight"
    state = f"{key}.quant_state.bitsandbytes__nf4"
    bad = bytes(tensors[state].tolist()).replace(b'"nf4"', b'"nf9"')
    tensors[state] = torch.tensor(list(bad), dtype=torch.uint8)
    save_file(tensors, tmp_path / "nf4" / MODEL_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key} is quantized with quant_type='nf9'"):
        load_weights(tmp_path / "nf4")


@pytest.mark.parametrize("other", ["disk", "meta"])
def test_a_map_to_several_devices_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_llama: MakeModel, other: str
) -> None:
    pytest.importorskip("accelerate")
    tiny_llama(torch.bfloat16).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    spread = {"model.embed_tokens": "cpu", "model.layers": other, "model.norm": "cpu", "lm_head": "cpu"}
    options: dict[str, Any] = {"device_map": spread | {"model.rotary_emb": "cpu"}, "offload_folder": tmp_path / "off"}
    with pytest.raises(ModelStateError, match=f"over cpu, {other}: one compiled graph serves one device"):
        load(tmp_path / "dense", qc.QLoRAQuantizationConfig(), **options)
    assert load(tmp_path / "dense", qc.QLoRAQuantizationConfig(), device_map={"": "cpu"}).device.type == "cpu"


def test_adapters_of_peft_on_it_are_in_the_op_and_nothing_dense_is_saved(tmp_path: Path, tiny_llama: MakeModel) -> None:
    """Linears without an adapter, too: all are in 4 bits, whatever the configuration says of PEFT's models."""
    peft = pytest.importorskip("peft")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    loaded = load(tmp_path / "dense", qc.QLoRAQuantizationConfig(), dtype=torch.float32)
    model = peft.get_peft_model(loaded, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)

    def gradients(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    compiled = torch.compile(model, backend="qlora", options={"compute_dtype": "float32", "lowering": "aot_eager"})
    found = gradients(compiled)
    for name, gradient in expected.items():  # fp32 sums in another order
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    linears = qc.explain(model).linears
    assert len(linears) == 7 and sum(bool(linear.rank) for linear in linears) == 2
    weights = {tuple(p.shape) for p in model.parameters() if isinstance(p, qc.QuantizedTensor)}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(input_ids=IDS, labels=IDS).loss.backward()
    assert saved and not any(t.is_floating_point() and tuple(t.shape) in weights for t in saved)


def test_a_4_bit_weight_that_peft_is_to_train_in_full_is_refused(tmp_path: Path, tiny_llama: MakeModel) -> None:
    peft = pytest.importorskip("peft")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    loaded = load(tmp_path / "dense", qc.QLoRAQuantizationConfig(), dtype=torch.float32)
    model = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    with pytest.raises(
        ConfigError, match=r"modules_to_save names .*o_proj.*in 4 bits and does not train.*skip_modules"
    ):
        torch.compile(model, backend="qlora", options={"lowering": "aot_eager"})(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("door", ["prepare", "compile", "example_inputs"])
def test_what_no_adapter_goes_to_is_read_as_codes_all_the_same(
    door: str, tmp_path: Path, tiny_llama: MakeModel
) -> None:
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    model = load(tmp_path / "dense", qc.QLoRAQuantizationConfig(skip_modules=["o_proj"]), dtype=torch.float32)
    plain = logits(model)
    options = {"r": 3, "target_modules": ["q_proj", "up_proj"], "compute_dtype": "float32", "lowering": "aot_eager"}
    if door != "compile":
        qc.prepare(model, options, {"input_ids": IDS} if door == "example_inputs" else None)
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-4)  # B = 0; fp32 sums in another order
    compiled = torch.compile(model, backend="qlora", options=options if door == "compile" else None)
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    linears = {linear.name.split(".")[-1]: linear for linear in qc.explain(model).linears}
    assert sorted(linears) == ["down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert {name for name, linear in linears.items() if linear.rank} == {"q_proj", "up_proj"}
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.requires_grad for p in model.parameters()) == 4, trained
    products = [s for s in qc.explain(model).passes if s.name == "fuse_lora_linear"]
    assert products[0].rewrites == 6
    qc.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_what_peft_would_merge_into_codes_is_refused(kind: str, tmp_path: Path, tiny_llama: MakeModel) -> None:
    """They assign `weight.data`, which a tensor of codes would pass by."""
    peft = pytest.importorskip("peft")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    loaded = load(tmp_path / "dense", qc.QLoRAQuantizationConfig(), dtype=torch.float32)
    if kind == "dora":
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    else:
        config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False)
    model = peft.get_peft_model(loaded, config)
    before = logits(model)
    with pytest.raises(ModelStateError, match=r"\.data = \.\.\. would be lost: copy_\(\) quantizes again.*export"):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
