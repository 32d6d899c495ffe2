"""torch.compile(model, backend="qlora") on models that bitsandbytes quantized and PEFT adapted, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
OPTIONS = {"lowering": "aot_eager"}
IDS = torch.randint(0, 211, (2, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def four_bit(tiny_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """A one-layer Llama in 4 bits, loaded by transformers through bitsandbytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llama(torch.bfloat16, **sizes, **heads).save_pretrained(tmp_path / "dense")

    def load(quant_type: str = "nf4", double_quant: bool = True) -> Any:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", dtype=torch.bfloat16, quantization_config=quantization
        )

    return load


def adapted(model: Any, **options: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(4)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def losses(model: Any, run: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    out = []
    for _ in range(steps):
        loss = run(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_training_is_peft_s_own(four_bit: Callable[..., Any], tmp_path: Path) -> None:
    """The same losses step by step, on the same parameters, and what `save_pretrained` writes afterwards."""
    kbit = peft.prepare_model_for_kbit_training
    # In evaluation mode bitsandbytes repacks its codes in place, on a CPU with AVX-512 BF16.
    reference, model = (adapted(kbit(four_bit(), use_gradient_checkpointing=False)).train() for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    storage = {n: p.data_ptr() for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    expected = losses(reference, reference, steps=20)
    found = losses(model, torch.compile(model, backend="qlora", options=OPTIONS), steps=20)
    assert expected[0] - expected[-1] > 0.5  # it learns
    # bf16 low-rank products against PEFT's fp32 ones; with other adapters the losses differ by more than 0.01
    assert found == pytest.approx(expected, abs=2e-3)
    assert [name for name, _ in model.named_parameters()] == names
    assert {n: p.data_ptr() for n, p in model.named_parameters() if n in storage} == storage

    report = qc.explain(model)
    assert len(report.linears) == len(storage) == 7
    assert {linear.lowering for linear in report.linears} <= {
        "library_gemm",
        "fp32_gemm",
        "fused_fp32",
        "codes",
        "codes_fp32",
    }  # by machine
    assert [linear.rank for linear in report.linears] == [{"default": 3}] * 7
    assert not any("bitsandbytes" in record.target for record in report.stages["group_linears"])
    model.save_pretrained(tmp_path / "adapter")
    reference.save_pretrained(tmp_path / "reference")
    saved, theirs = (peft.utils.load_peft_weights(tmp_path / name, device="cpu") for name in ("adapter", "reference"))
    assert saved.keys() == theirs.keys()
    for key, value in saved.items():
        # AdamW's steps have the size of lr wherever a gradient is near zero and its sign open: 20 of them, both ways
        torch.testing.assert_close(value, theirs[key], atol=2 * 20 * 5e-3, rtol=0)
        assert (value - theirs[key]).abs().mean() < 2e-3


@pytest.mark.slow  # compiled by Inductor, twice
def test_training_in_evaluation_mode(four_bit: Callable[..., Any]) -> None:
    """On a CPU with AVX-512 BF16 bitsandbytes then repacks weights within the traced call; Inductor alone fails on it."""
    reference, model = adapted(four_bit()), adapted(four_bit())
    found = losses(model, torch.compile(model, backend="qlora"), steps=3)
    assert found == pytest.approx(losses(reference, reference, steps=3), abs=2e-3)  # bf16, as above


def test_adapters_are_switched_by_peft_s_own_calls(four_bit: Callable[..., Any]) -> None:
    model = adapted(four_bit("fp4", double_quant=False))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=9, init_lora_weights=False, target_modules=["q_proj"]))
    compiled = torch.compile(model, backend="qlora", options=OPTIONS)
    seen = []
    with torch.no_grad():
        for switch in (
            lambda: None,
            lambda: model.set_adapter("other"),
            lambda: model.base_model.disable_adapter_layers(),
        ):
            switch()
            expected, found = model(input_ids=IDS).logits, compiled(input_ids=IDS).logits
            # logits of size 1 in bf16, through one layer
            torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.02)
            seen.append(found)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_model_without_adapters_computes_from_its_codes_and_stays_as_it_is(four_bit: Callable[..., Any]) -> None:
    model = four_bit()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        found = torch.compile(model, backend="qlora", options=OPTIONS)(input_ids=IDS).logits
    torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.02)  # bf16, as above
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert len(qc.explain(model).linears) == 7


def test_dora_runs_as_traced_and_the_report_names_it() -> None:
    """PEFT's DoRA breaks the graph: its pieces are reported together."""
    inner = nn.Sequential(bnb.nn.Linear4bit(64, 21, False, compute_dtype=torch.float32)).to("cpu")
    model = adapted(inner, target_modules=["0"], use_dora=True, task_type=None)
    x = torch.randn(5, 64)
    expected = model(x)
    found = torch.compile(model, backend="qlora", options={"lowering": "eager"})(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # fp32
    declined = dict(item for result in qc.explain(model).passes for item in result.declined)
    assert declined["base_model.model.0"].startswith("its adapter 'default' is Dora")


def test_a_dense_model_is_quantized_if_asked(tiny_llama: Callable[..., Any]) -> None:
    model = adapted(tiny_llama(num_hidden_layers=1), target_modules=["q_proj", "down_proj"])
    head, plain = model.base_model.model.lm_head.weight, model.base_model.model.model.layers[0].self_attn.k_proj.weight
    options = {**OPTIONS, "quantize": True}
    found = losses(model, torch.compile(model, backend="qlora", options=options))
    assert found[0] > found[-1]
    quantized = [name for name, p in model.named_parameters() if isinstance(p, qc.QuantizedTensor)]
    assert [name.split(".")[-3] for name in quantized] == ["q_proj", "down_proj"]
    assert model.base_model.model.lm_head.weight is head
    assert model.base_model.model.model.layers[0].self_attn.k_proj.weight is plain
    ranks = {linear.name.split(".")[-1]: linear.rank for linear in qc.explain(model).linears}
    assert ranks == {"q_proj": {"default": 3}, "down_proj": {"default": 3}}


@pytest.mark.slow
def test_gradient_checkpointing_of_a_4_bit_model(four_bit: Callable[..., Any]) -> None:
    """`prepare_model_for_kbit_training` switches it on: bitsandbytes' products stand inside checkpointed regions then."""
    found = []
    for checkpointing in (True, False):
        torch._dynamo.reset()
        model = peft.prepare_model_for_kbit_training(
            four_bit(),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        model = adapted(model).train()
        found.append(losses(model, torch.compile(model, backend="qlora", options=OPTIONS), steps=2))
        rewrites = {one.name: one.rewrites for one in qc.explain(model).passes}
        assert rewrites["inline_checkpoints"] == checkpointing
        assert (rewrites["fuse_lora_linear"], rewrites["group_linears"]) == (7, 2)
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # bf16; the casts around the regions differ
