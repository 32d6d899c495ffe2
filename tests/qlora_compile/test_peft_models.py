"""Dense models that PEFT adapted: which products have adapters in the op, what `quantize=True` leaves."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile.backend import qlora
from qlora_compile.errors import CheckpointError, ModelStateError
from qlora_compile.pass_manager import insert_pass
from qlora_compile.passes import PIPELINE

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
OPTIONS = {"quantize": True, "compute_dtype": "float32", "lowering": "aot_eager"}
Count = Callable[..., list[tuple[str, int]]]


class FeedForward(nn.Module):
    """The dropout's result is the second linear's input, as in T5."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.wi, self.wo, self.p = nn.Linear(64, 96), nn.Linear(96, 40), p

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.dropout(torch.relu(self.wi(x)), self.p, self.training))


def gpt2() -> Any:
    sizes = {"vocab_size": 211, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def adapted(model: nn.Module, config: Any) -> Any:
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture
def products() -> Count:
    """Compile, call, backward -> (name, number of adapters) of each lora_linear op."""

    def run(model: nn.Module, *args: Any, options: dict[str, Any] = OPTIONS, **kwargs: Any) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []

        def count(gm: torch.fx.GraphModule, ctx: Any) -> int:
            for node in gm.graph.nodes:
                if node.target is torch.ops.qlora.lora_linear.default:
                    found.append((node.meta["qlora_sites"][0].split(".")[-1], len(node.args[6])))
            return 0

        backend = functools.partial(qlora, pipeline=insert_pass(PIPELINE, count, after="fuse_lora_linear"))
        out = torch.compile(model, backend=backend, options=options)(*args, **kwargs)
        (out.loss if hasattr(out, "loss") else out.sum()).backward()
        return found

    return run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by", ["peft", "prepare"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_linear_whose_input_is_a_dropout_s_result_has_its_adapter(
    products: Count, p: float, by: str, training: bool
) -> None:
    model = FeedForward(p)
    if by == "peft":
        model = adapted(model, peft.LoraConfig(r=3, target_modules=["wi", "wo"]))
    else:
        qc.prepare(model, {"r": 3, "compute_dtype": "float32"})
    options = OPTIONS if by == "peft" else {"lowering": "aot_eager"}
    assert products(model.train(training), torch.randn(5, 64), options=options) == [("wi", 1), ("wo", 1)]


@pytest.mark.parametrize("quantize", [True, "auto"])
def test_conv1d_has_its_adapter(products: Count, quantize: bool | str) -> None:
    """PEFT's branch reads x as it is, Conv1D's product a view of it."""
    model = adapted(gpt2(), peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True))
    ids = torch.randint(0, 211, (2, 13))
    found = products(model, input_ids=ids, labels=ids, options={**OPTIONS, "quantize": quantize})
    assert found == [("c_attn", 1), ("c_proj", 1), ("c_fc", 1), ("c_proj", 1)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()  # eagerly, on the same weights
    for name, parameter in trained.items():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
            "no effect.*q_proj: its adapter 'default' is Dora",
        ),
        ("LoHaConfig", "no effect.*its adapter is PEFT's loha, no LoRA"),
        ("LoKrConfig", "no effect.*its adapter is PEFT's lokr, no LoRA"),
        ("IA3Config", "no effect.*its adapter is PEFT's ia3, no LoRA"),
        ({"target_modules": ["norm"], "layers_to_transform": None}, None),
    ],
    ids=str,
)
def test_what_quantize_leaves_dense_is_told(tiny_llama: Callable[..., Any], config: Any, words: str | None) -> None:
    """Also where PEFT's code breaks the graph, so that no graph has the linear."""
    if isinstance(config, str):
        more = {"feedforward_modules": ["down_proj"]} if config == "IA3Config" else {}
        settings = getattr(peft, config)(target_modules=["q_proj", "down_proj"], **more)
    elif words is None:
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        words = "no effect.*none of its adapters is one of a linear layer"
    else:
        settings = peft.LoraConfig(r=3, **config)
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), settings)
    ids = torch.randint(0, 211, (2, 13))
    with pytest.warns(UserWarning, match=f"quantize=True has {words}"):
        torch.compile(model, backend="qlora", options=OPTIONS)(input_ids=ids, labels=ids).loss.backward()
    assert not any(isinstance(p, qc.QuantizedTensor) for p in model.parameters())


@pytest.mark.parametrize("kind", ["dense", "compiled", "in 4 bits", "bitsandbytes"])
def test_a_model_of_peft_s_is_not_exported_without_its_adapters(
    tmp_path: Path, tiny_llama: Callable[..., Any], kind: str
) -> None:
    base = tiny_llama(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bit)
        with pytest.raises(CheckpointError, match="in bitsandbytes' 4 bits: save_pretrained it"):
            qc.export(base, tmp_path / "out")
    model = adapted(base, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    if kind in ("compiled", "in 4 bits"):
        model.compile(backend="qlora", options={**OPTIONS, "quantize": kind == "in 4 bits"})
        ids = torch.randint(0, 211, (2, 13))
        model(input_ids=ids, labels=ids)
    calls = (
        lambda: qc.export(model, tmp_path / "out", base_precision="dequantized"),
        lambda: qc.export(model, tmp_path / "out", base=tmp_path / "base"),
        lambda: qc.export(model, tmp_path / "out", {"default": 1.0}, verify=True),
        lambda: qc.save_adapter(model, tmp_path / "out"),
        lambda: qc.set_adapters(model, {"default": 0.5}),
        lambda: qc.combine_adapters(model, {"default": 0.5}, "other"),
    )
    for call in calls:
        with pytest.raises(ModelStateError, match=r"adapters of this model are PEFT's.*save_pretrained"):
            call()
    assert not (tmp_path / "out").exists()


def test_merged_weights_are_not_quantized(tiny_llama: Callable[..., Any]) -> None:
    """`unmerge_adapter` would be refused for ever, and the base be lost."""
    model = adapted(tiny_llama(num_hidden_layers=1), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    ids = torch.randint(0, 211, (2, 13))
    with pytest.warns(UserWarning, match=r"no effect.*merged into it \(unmerge_adapter"):
        torch.compile(model, backend="qlora", options=OPTIONS)(input_ids=ids, labels=ids)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():  # W + BA - BA in fp32
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-5)


def test_layers_that_break_the_graph_share_code(tiny_llama: Callable[..., Any]) -> None:
    """DoRA breaks it in every layer: guards of ours must not be what each layer compiles anew for."""
    from torch._dynamo.utils import counters

    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "up_proj", "down_proj"])
    ids, graphs = torch.randint(0, 211, (2, 13)), []
    for backend, options in (("aot_eager", None), ("qlora", {"lowering": "aot_eager"})):
        torch._dynamo.reset()
        counters.clear()
        model = adapted(tiny_llama(num_hidden_layers=3), config)
        torch.compile(model, backend=backend, options=options)(input_ids=ids, labels=ids).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 3 and graphs[1] <= graphs[0]


def test_every_layer_with_another_kind_of_adapter_is_in_the_report(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model = adapted(model, peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(0, 211, (2, 13))
    torch.compile(model, backend="qlora", options={"lowering": "aot_eager"})(input_ids=ids, labels=ids)
    declined = [item for result in qc.explain(model).passes for item in result.declined]
    named = {name.split(".")[-1] for name, reason in declined if "is Dora, which runs as traced" in reason}
    assert named == {"q_proj", "down_proj"}


def test_a_base_weight_that_trains_stays_dense_and_trains(tiny_llama: Callable[..., Any]) -> None:
    model = adapted(tiny_llama(num_hidden_layers=1), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    attention = model.base_model.model.model.layers[0].self_attn
    weight = attention.q_proj.base_layer.weight.requires_grad_(True)
    ids = torch.randint(0, 211, (2, 13))
    with pytest.warns(UserWarning, match=r"leaves 1 of 2 adapted weights.*q_proj: it trains \(requires_grad\)"):
        torch.compile(model, backend="qlora", options=OPTIONS)(input_ids=ids, labels=ids).loss.backward()
    assert attention.q_proj.base_layer.weight is weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert isinstance(attention.v_proj.base_layer._parameters["weight"], qc.QuantizedTensor)


def test_reasons_name_what_peft_did(tiny_llama: Callable[..., Any]) -> None:
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = adapted(tiny_llama(num_hidden_layers=1), peft.LoraConfig(r=3, **settings))
    ids = torch.randint(0, 211, (2, 13))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # all linear layers with an adapter are in 4 bits
        torch.compile(model, backend="qlora", options=OPTIONS)(input_ids=ids, labels=ids).loss.backward()
    declined = dict(item for result in qc.explain(model).passes for item in result.declined)
    assert declined["base_model.model.lm_head.modules_to_save.default"] == "it trains (requires_grad)"
    assert declined["base_model.model.model.layers.0.self_attn.k_proj"] == "PEFT gave it no adapter"
