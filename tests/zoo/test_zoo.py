"""Every architecture of architectures.toml: quantized where it should be, trains, compiled equals eager, saves, exports.

`pytest tests/zoo --models-doc docs/models.md` writes the table of what was found (`make models-doc`).
"""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile as qc
from qlora_compile import equal_layers
from qlora_compile.modules import adapter_parameters, adapter_sites, is_quantized
from qlora_compile.weight_reads import weights_read_directly

TABLE = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))
DEFAULTS = TABLE.pop("defaults")
OPTIONS = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 9}
# fp32 through two layers, sums of at most 80 terms added in another order; a loss or gradient near 0 needs the atol
TOLERANCE = {"atol": 2e-4, "rtol": 2e-3}
DROPS = (
    "attention_dropout",
    "dropout",
    "attn_dropout",
    "activation_dropout",
    "residual_dropout",
    "drop_prob",
    "layerdrop",
)
AUTO_CLASS = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "image": "AutoModelForImageClassification",
    "contrastive": "AutoModel",
    "vision_language": "AutoModelForImageTextToText",
}


def _architectures() -> list[Any]:
    cases = []
    for task, models in TABLE.items():
        for name, entry in models.items():
            marks = () if entry.get("ci") else (pytest.mark.slow,)
            cases.append(pytest.param(task, name, entry, id=name, marks=marks))
    return cases


def _build(task: str, name: str, overrides: dict[str, Any]) -> nn.Module:
    import transformers

    defaults = {} if task in ("contrastive", "vision_language") else DEFAULTS
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(name, **(defaults | overrides))
    model: nn.Module = getattr(transformers, AUTO_CLASS[task]).from_config(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # eager and compiled draw other masks
        for attribute in DROPS:
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model.float()


def _inputs(task: str, model: nn.Module) -> dict[str, Tensor | bool]:
    ids = torch.randint(3, 99, (2, 11))
    image = torch.randn(2, 3, 12, 12)
    if task == "masked":
        return {"input_ids": ids, "labels": ids}
    if task == "seq2seq":
        return {"input_ids": ids, "labels": ids[:, :7].contiguous()}
    if task == "speech":
        return {"input_features": torch.randn(2, 10, 24), "labels": ids}
    if task == "image":
        return {"pixel_values": image, "labels": torch.tensor([3, 5])}
    if task == "contrastive":
        return {"input_ids": ids, "pixel_values": image, "return_loss": True}
    if task == "vision_language":
        ids[:, 1:11] = 100  # nine patches and the class token
        tail = torch.randint(3, 99, (2, 6))
        ids = torch.cat([ids, tail], 1)
        return {"input_ids": ids, "pixel_values": image, "labels": ids.masked_fill(ids == 100, -100)}
    return {"input_ids": ids, "labels": ids}


def _linear_names(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _dense_by_rule(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, str]:
    """Linears that stay dense: the output head, and what shares its tensor with an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = [getattr(model, name, None) for name in ("classifier", "score")] if name_is_classifier(model) else []
    heads.append(model.get_output_embeddings())
    read = {
        f"{p}.{c}".lstrip("."): cls for p, m in model.named_modules() for c, cls in weights_read_directly(m).items()
    }
    dense = {}
    for name, module in linears.items():
        if any(module is head for head in heads):
            dense[name] = "output head"
        elif id(module.weight) in embeddings:
            dense[name] = "tied to an embedding"
        elif type(module).__name__.endswith("Router"):
            dense[name] = "routes tokens to experts"
        elif name in read:
            dense[name] = f"{read[name]} reads its weight directly"
    return dense


def name_is_classifier(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__


def _dense_three_dimensional(model: nn.Module) -> list[str]:
    """Expert parameters `[E, out, in]` that stayed dense, by their last name."""
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    found = [(n, p) for m in experts for n, p in m.named_parameters(recurse=False) if p.dim() == 3]
    return sorted({n for n, p in found if not is_quantized(p)})


def _by_reason(dense: dict[str, str]) -> str:
    """`layers.*.mixer.out_proj (reason)`: layers' numbers left out, so that equal layers are one entry."""
    entries = {f"{re.sub('[.][0-9]+[.]', '.*.', name)} ({why})" for name, why in dense.items()}
    return "; ".join(sorted(entries))


def _loss(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """Phimoe draws its experts at random in training: the same ones each time."""
    torch.manual_seed(11)
    loss: Tensor = model(**inputs).loss
    return loss


def _breaks(call: Callable[[], Any]) -> dict[str, int]:
    counters.clear()
    call()
    return dict(counters["graph_break"])


@pytest.mark.parametrize(("task", "name", "entry"), _architectures())
def test_architecture(
    task: str, name: str, entry: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("task", task)
    record_property("note", entry.get("note", ""))
    overrides = entry.get("config", {})
    plain = _build(task, name, overrides).train()
    inputs = _inputs(task, plain)
    linears = _linear_names(plain)
    dense = _dense_by_rule(plain, linears)
    _loss(plain, inputs)  # transformers installs hooks in the first call, which breaks the graph then and never again
    plain_breaks = _breaks(lambda: torch.compile(plain, backend="eager")(**inputs))
    torch._dynamo.reset()
    plain.save_pretrained(tmp_path / "base")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says what `dense` lists
        model = qc.prepare(plain, OPTIONS)
    wrong = {n for n, m in linears.items() if is_quantized(m.weight) == (n in dense)}
    assert not wrong, f"dense though they should be quantized, or the other way round: {sorted(wrong)}"
    sites = adapter_sites(model)
    assert set(linears) - set(dense) <= set(sites)
    assert not _dense_three_dimensional(model), "experts that stayed dense"

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites.values():
            for adapter in site.adapters:
                site.b(adapter).normal_(std=0.05, generator=generator)
    compiled = torch.compile(model, backend="qlora")
    loss_eager = _loss(model, inputs)
    loss_eager.backward()
    grads_eager = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    breaks = _breaks(lambda: _loss(compiled, inputs).backward())
    assert breaks.items() <= plain_breaks.items(), "a graph break of ours"
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == grads_eager.keys()
    for key, grad in grads.items():
        scale = grads_eager[key].abs().max().item()
        torch.testing.assert_close(grad, grads_eager[key], atol=TOLERANCE["atol"] * max(scale, 1e-1), rtol=2e-3)

    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=5e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = _loss(compiled, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[5] < losses[0] - 1e-3, f"the loss does not fall: {losses}"
    torch.testing.assert_close(losses[0], loss_eager.item(), **TOLERANCE)

    model.eval()
    with torch.no_grad():
        trained = _outputs(model, inputs)
    qc.save_adapter(model, tmp_path / "adapter")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = qc.prepare(_build(task, name, overrides), OPTIONS).eval()
    qc.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(_outputs(again, inputs), trained, **TOLERANCE)
    record_property("quantized", len(sites))
    record_property("dense", _by_reason(dense))
    record_property("experts", ", ".join(_dense_three_dimensional(model)))
    record_property("breaks", sum(breaks.values()))

    qc.export(model, tmp_path / "merged", None, "dequantized", base=tmp_path / "base")
    merged = type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(_outputs(merged, inputs), trained, **TOLERANCE)


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    logits = out.logits if hasattr(out, "logits") else out.logits_per_image
    return logits.detach().clone()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name", "entry"), _architectures())
def test_equal_layers_traced_as_one(
    task: str, name: str, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers of eager code where two layers are enough to be equal (`layer_tracing`); without gradients, so that the
    first layer's input is like the second's."""
    monkeypatch.setattr(equal_layers, "_LEAST", 2)
    model = _build(task, name, entry.get("config", {})).train()
    for config in [module.config for module in model.modules() if hasattr(module, "config")]:
        config.use_cache = False  # a cache among the arguments has each layer traced in line
    for mixer in [module for module in model.modules() if hasattr(module, "use_associative_scan")]:
        mixer.use_associative_scan = (
            False  # Mamba's scan once it is compiled, which torch 2.13 fails on without gradients
        )
    inputs = _inputs(task, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qc.prepare(model, OPTIONS)
    with torch.no_grad():
        eager = _loss(model, inputs)
        torch.testing.assert_close(_loss(torch.compile(model, backend="qlora"), inputs), eager, **TOLERANCE)
