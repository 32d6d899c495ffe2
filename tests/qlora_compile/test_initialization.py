"""PiSSA, OLoRA and LoftQ on 4-bit bases: peft's definitions, what they are good for, and plain LoRA on saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import ConfigError
from qlora_compile.initialization import spectral_start
from qlora_compile.modules import adapter_sites
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint

METHODS = ("pissa", "pissa_niter_8", "olora", "loftq")
SETTINGS: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 15,
    "compute_dtype": "float32",
    "target_modules": ("q_proj", "up_proj"),
}


def effective(site: Any) -> torch.Tensor:
    """What the layer multiplies with: base + s B A, [out, in]."""
    weight = site.weight.dequantize() if isinstance(site.weight, qc.QuantizedTensor) else site.weight
    weight = weight.t() if site.fan_in_fan_out else weight
    return weight.float() + site.scaling() * (site.b() @ site.a())


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_factors_are_peft_s(method: str) -> None:
    peft = pytest.importorskip("peft")
    layer = nn.Sequential(nn.Linear(50, 30, bias=False))
    weight = layer[0].weight.detach().clone()
    config = peft.LoraConfig(r=5, lora_alpha=15, init_lora_weights=method, target_modules=["0"])
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    ours = spectral_start(weight, method, 5, 3.0, lambda rest: (rest, rest))
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(ours.b @ ours.a, product, atol=1e-5, rtol=1e-5)  # fp32 decompositions
    torch.testing.assert_close(ours.base, theirs.base_layer.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.a.norm(dim=1), theirs.lora_A["default"].weight.norm(dim=1), atol=1e-5, rtol=1e-5)


def test_loftq_is_peft_s_at_a_scaling_of_one() -> None:
    """peft's LoftQ has its own 4-bit table; its low-rank step on what a quantization loses is compared."""
    pytest.importorskip("peft")
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = torch.randn(30, 64)
    values = qc.quantize_4bit(weight).dequantize()
    ours = spectral_start(weight, "loftq", 5, 1.0, lambda rest: (values, values))
    theirs = _low_rank_decomposition(weight - values, reduced_rank=5)
    torch.testing.assert_close(ours.b @ ours.a, theirs["L"] @ theirs["R"], atol=1e-5, rtol=1e-5)
    scaled = spectral_start(weight, "loftq", 5, 3.0, lambda rest: (values, values))
    torch.testing.assert_close(3.0 * (scaled.b @ scaled.a), ours.b @ ours.a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_base_and_adapter_are_the_weight(tiny_llama: Callable[..., Any], method: str, conv1d: bool) -> None:
    """Closer to it than the 4-bit weight alone; OLoRA's base is `W - s B A`, here with s = 3, which is larger than W."""
    targets: tuple[str, ...] = SETTINGS["target_modules"]
    if conv1d:
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=36, n_layer=1, n_head=3, vocab_size=97))
        targets = ("c_attn",)
    else:
        model = tiny_llama()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    qc.prepare(model, {**SETTINGS, "target_modules": targets, "init_lora_weights": method})
    for name, site in adapter_sites(model).items():
        weight = dense[f"{name}.weight"]
        plain = qc.quantize_4bit(weight, transposed=conv1d).dequantize()
        wanted, plain = (weight.t(), plain.t()) if conv1d else (weight, plain)
        error, plain_error = (effective(site) - wanted).norm(), (plain - wanted).norm()
        assert 0 < error < (4.0 if method == "olora" else 1.0) * plain_error, name
        if method == "loftq":  # one round: the ordinary base
            assert torch.equal(site.weight.dequantize(), qc.quantize_4bit(weight, transposed=conv1d).dequantize())


def test_more_rounds_of_loftq_lose_less(tiny_llama: Callable[..., Any]) -> None:
    errors = []
    for rounds in (1, 5):
        model = tiny_llama()
        dense = {name: p.detach().clone() for name, p in model.named_parameters()}
        qc.prepare(model, {**SETTINGS, "init_lora_weights": "loftq", "loftq_iter": rounds})
        sites = adapter_sites(model)
        errors.append(
            sum(float((effective(s).detach() - dense[f"{n}.weight"]).square().sum()) for n, s in sites.items())
        )
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_saved_is_plain_lora_on_the_original_weights(
    tiny_checkpoint: Path, tmp_path: Path, method: str, use_rslora: bool
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    qc.prepare(model, {**SETTINGS, "init_lora_weights": method, "use_rslora": use_rslora})
    before = {name: site.scaling() * (site.b() @ site.a()).detach() for name, site in adapter_sites(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    qc.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, site in adapter_sites(model).items():
        trained = site.scaling() * (site.b() @ site.a()) - before[name]
        delta = loaded.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta, trained, atol=1e-5, rtol=1e-4)  # fp32, of differences
    folder = export(tiny_checkpoint, tmp_path / "folder", tmp_path / "adapter", dtype="float32").out
    memory = export(model, tmp_path / "memory", base=tiny_checkpoint, dtype="float32").out
    ours, theirs = open_checkpoint(folder), open_checkpoint(memory)
    for key in ours.specs:
        torch.testing.assert_close(ours.tensor(key), theirs.tensor(key), atol=1e-6, rtol=1e-6)


def test_a_model_in_memory_exports_what_it_computes(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = qc.prepare(tiny_llama(), {**SETTINGS, "init_lora_weights": "pissa"})
    wanted = {f"{name}.weight": effective(site).detach() for name, site in adapter_sites(model).items()}
    out = open_checkpoint(export(model, tmp_path / "out", base_precision="dequantized", verify=True).out)
    for key, weight in wanted.items():
        torch.testing.assert_close(out.tensor(key), weight, atol=1e-6, rtol=1e-6)


def test_a_base_that_the_start_was_taken_out_of_is_not_rebuilt_from_folders(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    qc.save_adapter(qc.prepare(model, {**SETTINGS, "init_lora_weights": "pissa"}), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="init_lora_weights='pissa' changed the 4-bit base"):
        export(tiny_checkpoint, tmp_path / "out", tmp_path / "adapter", base_precision="dequantized")


def test_a_dense_base_and_what_cannot_be(tiny_llama: Callable[..., Any]) -> None:
    model, dense = tiny_llama(), tiny_llama()
    qc.prepare(model, {**SETTINGS, "init_lora_weights": "olora", "quantize": False})
    for name, site in adapter_sites(model).items():
        torch.testing.assert_close(effective(site), dense.get_parameter(f"{name}.weight"), atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="another with quantize=False"):
        qc.QLoRAConfig(init_lora_weights="loftq", quantize=False)
    with pytest.raises(
        ConfigError, match="one of True, False, 'gaussian', 'pissa', 'olora', 'loftq' or 'pissa_niter_4'"
    ):
        qc.QLoRAConfig(init_lora_weights="pissa_niter_x")
    with pytest.raises(ConfigError, match=r"needs r of at most 48 at .*q_proj, got 50"):
        qc.prepare(tiny_llama(), {**SETTINGS, "r": 50, "init_lora_weights": "pissa"})


def test_both_doors_and_training(tiny_llama: Callable[..., Any]) -> None:
    ids = torch.arange(22).reshape(2, 11) * 3
    options = {**SETTINGS, "init_lora_weights": "pissa", "lowering": "aot_eager"}
    prepared, plain = qc.prepare(tiny_llama(), options), tiny_llama()
    loss = torch.compile(prepared, backend="qlora", options=options)(input_ids=ids, labels=ids).loss
    other = torch.compile(plain, backend="qlora", options=options)(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, other)
    loss.backward()
    sites = adapter_sites(prepared).values()
    assert all(float(site.a().grad.norm()) > 0 < float(site.b().grad.norm()) for site in sites)  # both from step one
