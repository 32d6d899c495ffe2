"""`prepare` and the backend leave the same state: what they quantize, freeze and adapt, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_models import BLOCKS, FP32, TOKENS, Block, Language, fill, same_state, seeded

from qlora_compile import QLoRAConfig, prepare
from qlora_compile.errors import ConfigError, InvalidWeightError, ModelStateError, NoTargetError, UnknownOptionError
from qlora_compile.modules import QLoRALinear, adapter_parameters, adapter_sites, prepared_config
from qlora_compile.tensor import QuantizedTensor, quantize_4bit

EAGER = FP32 | {"lowering": "eager"}


# --- what changes and what does not ---


def test_linears_are_quantized_and_adapted_in_place_and_the_rest_is_frozen():
    model = Language()
    weight = model.layers[0].q_proj.weight.detach().clone()
    dense = {name: p for name, p in model.named_parameters() if "proj.weight" not in name}
    assert prepare(model, FP32) is model
    assert list(adapter_sites(model)) == BLOCKS
    assert prepared_config(model) == QLoRAConfig.from_options(FP32)
    expected = quantize_4bit(weight, block_size=32)
    assert torch.equal(model.layers[0].q_proj.weight.codes, expected.codes)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{site}.lora_{part}.default" for site in BLOCKS for part in "AB"
    }
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in dense.items())  # head, embedding, norms, biases: the same objects


def test_the_output_of_a_fresh_adapter_is_the_quantized_base():
    model = Language()
    base = copy.deepcopy(model)
    for layer in base.layers:
        for linear in (layer.q_proj, layer.out_proj):
            linear.weight = nn.Parameter(quantize_4bit(linear.weight, block_size=32).dequantize())
    prepare(model, FP32)
    torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=1e-5, atol=1e-5)  # fp32 products in the same order


def test_a_config_a_mapping_and_nothing_are_the_same_door():
    assert prepared_config(prepare(Language(), None)) == QLoRAConfig()
    assert same_state(prepare(seeded(Language), QLoRAConfig(**FP32)), prepare(seeded(Language), FP32))


def test_a_weight_of_two_modules_is_quantized_once_and_has_one_adapter():
    model = nn.Sequential(nn.Linear(13, 13), nn.ReLU(), nn.Linear(13, 13))
    model[2].weight = model[0].weight
    prepare(model, FP32)
    assert list(adapter_sites(model)) == ["0"] and len(adapter_parameters(model)) == 2
    assert model[0].weight is model[2].weight and model[0].lora_A["default"] is model[2].lora_A["default"]
    fill(model)
    model(torch.randn(4, 13)).sum().backward()
    both = adapter_sites(model)["0"].b().grad.clone()
    model.zero_grad()
    model[2](torch.relu(model[0](torch.randn(4, 13)).detach())).sum().backward()
    assert not torch.equal(both, adapter_sites(model)["0"].b().grad)  # the first use counted too


def test_a_module_used_twice_has_one_adapter():
    linear = nn.Linear(13, 13)
    model = prepare(nn.Sequential(linear, nn.ReLU(), linear), FP32)
    assert list(adapter_sites(model)) == ["0"] and model[0] is model[2]


# --- targets ---


@pytest.mark.parametrize("options", [{}, {"exclude_modules": ()}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_head_tied_to_the_embedding_stays_dense(options: dict[str, Any]):
    model = prepare(Language(tied=True), FP32 | options)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.embed.weight
    assert not model.lm_head.weight.requires_grad and "lm_head" not in adapter_sites(model)


TARGETS = {
    "head excluded by default": ({}, BLOCKS),
    "nothing excluded": ({"exclude_modules": ()}, [*BLOCKS, "lm_head"]),
    "a list excludes, and only that": ({"exclude_modules": ["q_proj"]}, [BLOCKS[1], BLOCKS[3], "lm_head"]),
    "a whole name": ({"exclude_modules": ["layers.0.q_proj", "lm_head"]}, BLOCKS[1:]),
    "a regex": ({"exclude_modules": r"layers\.0\..*|lm_head"}, BLOCKS[2:]),
    "a suffix is no part of a word": ({"exclude_modules": ["proj", "lm_head"]}, BLOCKS),
    "targets by suffix": ({"target_modules": ["out_proj"]}, [BLOCKS[1], BLOCKS[3]]),
    "a target list may name the head": ({"target_modules": ["out_proj", "lm_head"]}, [BLOCKS[1], BLOCKS[3], "lm_head"]),
    "targets by regex": ({"target_modules": r".*\.1\.\w+_proj"}, BLOCKS[2:]),
    "exclusion wins": ({"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj"]}, BLOCKS[:1]),
    "modules_to_save are no targets": ({"modules_to_save": ["layers.0.q_proj"]}, BLOCKS[1:]),
}


@pytest.mark.parametrize("door", ["prepare", "backend"])
@pytest.mark.parametrize("name", TARGETS)
def test_which_linears_are_targets(name: str, door: str):
    options, expected = TARGETS[name]
    model = Language()
    if door == "prepare":
        prepare(model, FP32 | options)
    else:
        torch.compile(model, backend="qlora", options=EAGER | options)(TOKENS)
    assert list(adapter_sites(model)) == expected


@pytest.mark.parametrize("door", ["prepare", "backend"])
def test_modules_to_save_train_in_full_and_stay_dense(door: str):
    model, options = Language(), {"modules_to_save": ["layers.0", "lm_head", "embed"]}
    if door == "prepare":
        prepare(model, FP32 | options)
    else:
        torch.compile(model, backend="qlora", options=EAGER | options)(TOKENS)
    trains = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    inside = {f"layers.0.{name}" for name, _ in Block().named_parameters()}
    assert trains == {"embed.weight", "lm_head.weight"} | inside
    assert list(adapter_sites(model)) == BLOCKS[2:]


def test_rank_and_alpha_patterns_and_rslora():
    options = {"rank_pattern": {"q_proj": 2, "layers.1.out_proj": 0}, "alpha_pattern": {"layers.0.q_proj": 8}}
    sites = adapter_sites(prepare(Language(), FP32 | options))
    ranks = {name: [site.rank(a) for a in site.adapters] for name, site in sites.items()}
    assert ranks == dict(zip(BLOCKS, ([2], [3], [2], []), strict=True))  # rank 0: quantized, no adapter
    assert sites[BLOCKS[0]].scaling() == 4.0 and sites[BLOCKS[2]].scaling() == 2.5
    assert sites[BLOCKS[1]].scaling() == pytest.approx(5 / 3)
    model = prepare(Language(), FP32 | options | {"use_rslora": True})
    site = adapter_sites(model)[BLOCKS[0]]
    assert site.scaling() == pytest.approx(8 / 2**0.5) and site.alpha() == pytest.approx(8)


@pytest.mark.parametrize("door", ["prepare", "backend"])
def test_rank_zero_quantizes_only(door: str):
    model = Language()
    if door == "prepare":
        prepare(model, FP32 | {"r": 0})
    else:
        torch.compile(model, backend="qlora", options=EAGER | {"r": 0})(TOKENS)
    assert list(adapter_sites(model)) == BLOCKS and adapter_parameters(model) == []
    assert isinstance(model.layers[1].q_proj.weight, QuantizedTensor)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("door", ["prepare", "backend"])
def test_quantize_false_adds_adapters_to_dense_weights(door: str):
    model = Language()
    weight = model.layers[0].q_proj.weight
    if door == "prepare":
        prepare(model, FP32 | {"quantize": False})
    else:
        torch.compile(model, backend="qlora", options=EAGER | {"quantize": False})(TOKENS)
    assert list(adapter_sites(model)) == BLOCKS
    assert model.layers[0].q_proj.weight is weight and not weight.requires_grad
    assert isinstance(model.layers[0].q_proj, QLoRALinear) and len(adapter_parameters(model)) == 8


# --- again ---


def test_preparing_twice_with_the_same_config_changes_nothing():
    model = prepare(seeded(Language), FP32)
    before = dict(model.named_parameters())
    prepare(model, FP32)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert same_state(model, prepare(seeded(Language), FP32))


@pytest.mark.parametrize("option", [{"r": 4}, {"block_size": 64}, {"seed": 1}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("door", ["prepare", "backend"])
def test_preparing_again_with_another_config_is_refused(option: dict[str, Any], door: str):
    model = prepare(Language(), FP32)
    (name,) = option
    with pytest.raises(ModelStateError, match=f"already prepared with {name}="):
        if door == "prepare":
            prepare(model, FP32 | option)
        else:
            torch.compile(model, backend="qlora", options=option)(TOKENS)
    assert prepared_config(model) == QLoRAConfig.from_options(FP32)


def test_what_only_concerns_compiling_may_differ():
    model = prepare(Language(), FP32)
    assert prepare(model, FP32 | {"lowering": "eager", "activation_budget": 0.5}) is model


def test_a_copy_of_a_prepared_model_is_prepared():
    model = prepare(Language(), FP32)
    twin = copy.deepcopy(model)
    assert same_state(model, twin) and prepare(twin, FP32) is twin
    with pytest.raises(ModelStateError):
        prepare(twin, FP32 | {"r": 4})


# --- refusals ---


def test_a_rank_above_both_dimensions_names_the_module():
    with pytest.raises(ConfigError, match=r"r=23 is larger than both dimensions of layers\.0\.q_proj \(22 x 13\)"):
        prepare(Language(), FP32 | {"r": 23})
    prepare(Language(), FP32 | {"r": 22})


def test_no_target_lists_what_there_was():
    with pytest.raises(NoTargetError) as caught:
        prepare(Language(), FP32 | {"target_modules": ["k_proj"]})
    text = str(caught.value)
    assert "Language matches target_modules=('k_proj',)" in text and "layers.0.q_proj (target_modules does not" in text
    with pytest.raises(NoTargetError, match=r"lm_head \(its weight is tied to the embedding 'embed'\)"):
        prepare(Language(tied=True), FP32 | {"target_modules": ["lm_head"]})
    with pytest.raises(NoTargetError, match="it has no linear module; give prepare"):
        prepare(nn.Sequential(nn.LayerNorm(5)), FP32)


def test_no_target_changes_nothing():
    for door in ("prepare", "example_inputs", "backend"):
        model, options = Language(), {"target_modules": ["k_proj"]}
        with pytest.raises(NoTargetError):
            if door == "backend":
                torch.compile(model, backend="qlora", options=EAGER | options)(TOKENS)
            else:
                prepare(model, FP32 | options, example_inputs=(TOKENS,) if door == "example_inputs" else None)
        assert prepared_config(model) is None and all(p.requires_grad for p in model.parameters()), door


@pytest.mark.parametrize("door", ["prepare", "backend"])
def test_a_nan_weight_names_the_parameter(door: str):
    model = Language()
    with torch.no_grad():
        model.layers[1].out_proj.weight[3, 5] = float("nan")
    with pytest.raises(InvalidWeightError, match=r"^layers\.1\.out_proj: The weight holds NaN or infinity"):
        if door == "prepare":
            prepare(model, FP32)
        else:
            torch.compile(model, backend="qlora", options=EAGER)(TOKENS)


def test_a_repaired_model_can_be_prepared_after_the_refusal():
    model = seeded(Language)
    weight = model.layers[1].out_proj.weight
    value = weight.detach()[3, 5].clone()
    with torch.no_grad():
        weight[3, 5] = float("inf")
    with pytest.raises(InvalidWeightError):
        prepare(model, FP32)
    with torch.no_grad():
        weight[3, 5] = value
    assert same_state(prepare(model, FP32), prepare(seeded(Language), FP32))


def test_several_devices_are_named():
    model = Language()
    model.lm_head.to("meta")
    with pytest.raises(ModelStateError, match=r"several devices \('embed\.weight' on cpu, 'lm_head\.weight' on meta\)"):
        prepare(model, FP32)


def test_a_meta_model_can_be_prepared():
    with torch.device("meta"):
        model = Language()
    prepare(model, FP32)
    assert model.layers[0].q_proj.weight.codes.device.type == "meta"
    assert all(p.device.type == "meta" for p in adapter_parameters(model))


def test_something_that_is_no_module_and_unknown_options_are_refused():
    with pytest.raises(ModelStateError, match=r"needs an nn\.Module, got str"):
        prepare("meta-llama/Llama-3.1-8B", FP32)  # type: ignore[arg-type]
    with pytest.raises(UnknownOptionError, match="did you mean 'target_modules'"):
        prepare(Language(), {"target_module": "all-linear"})


# --- models of other people ---


def test_gpt2_is_adapted_through_its_conv1d():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=41, n_positions=32)
    model = prepare(transformers.GPT2LMHeadModel(config), FP32)
    sites = adapter_sites(model)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(sites) == [f"transformer.h.{i}.{name}" for i in (0, 1) for name in names]
    assert all(site.fan_in_fan_out and site.weight.transposed for site in sites.values())
    assert type(model.lm_head) is nn.Linear


def test_attention_that_is_no_target_still_computes():
    """nn.MultiheadAttention reads out_proj.weight and in_proj_weight itself and never calls the linear."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.down = nn.Linear(12, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.attention(x, x, x, need_weights=False)[0])

    model, x = Attends(), torch.randn(2, 5, 12)
    attention = model.attention(x, x, x, need_weights=False)[0].detach()
    prepare(model, FP32 | {"target_modules": ["down"]})
    assert list(adapter_sites(model)) == ["down"]
    for mode in (model.train, model.eval):
        mode()
        torch.testing.assert_close(model.attention(x, x, x, need_weights=False)[0], attention, rtol=1e-5, atol=1e-5)
        model(x).sum().backward()
    twin = copy.deepcopy(model).train()
    torch.testing.assert_close(
        torch.compile(twin, backend="qlora", options={"lowering": "eager"})(x), model(x), rtol=1e-5, atol=1e-5
    )


def test_a_transformer_encoder_layer_takes_no_shortcut_around_the_adapters():
    """Its fast path in evaluation mode reads the linears' weights and would skip the adapters."""
    model = nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, dropout=0.0, batch_first=True)
    prepare(model, FP32)
    fill(model)
    x = torch.randn(2, 5, 12)
    expected = model(x).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)  # the same fp32 products


def test_a_peft_model_is_left_as_peft_made_it():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Language(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    state = {name: (p, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    prepare(model, FP32)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _, _) in state.items()}
    for name, p in model.named_parameters():
        assert p.requires_grad == state[name][1] and torch.equal(p, state[name][2])
    assert adapter_sites(model) == {}


def test_a_device_map_of_one_device_works_and_one_of_several_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Layers left on disk are on another device too."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 12)[None]
    one = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, device_map="cpu")
    prepare(one, {"r": 4})
    assert one(input_ids=ids, labels=ids).loss.isfinite()
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    several = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, device_map=where, offload_folder=tmp_path)
    with pytest.raises(ModelStateError, match=r"several devices \(.* on cpu, .* on meta\).*FSDP2"):
        prepare(several, {"r": 4})


def test_an_embedding_named_as_a_target_is_refused() -> None:
    model = Language()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(NoTargetError, match="target_modules names 'embed', an embedding"):
        prepare(model, FP32 | {"target_modules": ["embed", "q_proj"]})
    assert {name: type(module) for name, module in model.named_modules()} == before
