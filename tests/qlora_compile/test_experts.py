"""Fused experts of transformers' models in 4 bits with adapters: numbers, both doors, what stays dense."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qlora_compile as qc
from qlora_compile.adapter_edits import add_adapter
from qlora_compile.errors import InvalidWeightError, ModelStateError
from qlora_compile.experts import QLoRAExperts, expert_parameters
from qlora_compile.modules import adapter_parameters, adapter_sites, is_quantized
from qlora_compile.numerics import with_dense_layers

transformers = pytest.importorskip("transformers")

FP32 = {"lowering": "aot_eager", "compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 6}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTRAL = {"num_local_experts": 5}
GPT_OSS = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 14, "sliding_window": 8}
# fp32 through one layer, sums of at most 152 terms in another order
TOLERANCE = {"atol": 2e-5, "rtol": 1e-3}


def build(name: str, implementation: str | None = None, **more: Any) -> nn.Module:
    """A tiny random language model; biases, where there are any, are not zero."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **(SIZES | more))
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for key, parameter in model.named_parameters():
        if "bias" in key:
            nn.init.normal_(parameter, std=0.1)
    return model.float()


def prepared(model: nn.Module, **options: Any) -> nn.Module:
    """Prepared, with adapters that do something."""
    qc.prepare(model, FP32 | options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            for adapter in site.adapters:
                site.b(adapter).normal_(std=0.05, generator=generator)
    return model


def inputs(rows: int = 2, length: int = 11) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (rows, length))
    return {"input_ids": ids, "labels": ids}


def merged(model: nn.Module, name: str, **more: Any) -> nn.Module:
    """A plain model whose weights are the prepared one's 4-bit values with the adapters added: what it must equal."""
    plain = build(name, "eager", **more)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            parameter.copy_(own[key].dequantize() if is_quantized(own[key]) else own[key])
        for site_name, site in adapter_sites(model).items():
            delta = site.b() @ site.a() * site.scaling()
            key = site_name if site.experts else f"{site_name}.weight"
            plain.get_parameter(key).add_(delta.mT if site.fan_in_fan_out else delta)
    return plain


@pytest.mark.parametrize(("name", "more"), [("mixtral", MIXTRAL), ("gpt_oss", GPT_OSS)])
def test_a_prepared_model_computes_what_its_merged_weights_compute(name: str, more: dict[str, Any]) -> None:
    model = prepared(build(name, **more))
    batch = inputs()
    want = merged(model, name, **more)(**batch)
    torch.testing.assert_close(model(**batch).logits, want.logits, **TOLERANCE)
    compiled = torch.compile(model, backend="qlora", fullgraph=True)
    got = compiled(**batch)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
    got.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch).loss.backward()
    assert len(gradients) == 2 * len(adapter_sites(model))
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(key).grad, **TOLERANCE)


def test_every_expert_matrix_is_quantized_and_adapted_alone() -> None:
    model = prepared(build("mixtral", **MIXTRAL))
    plain = build("mixtral", **MIXTRAL)
    sites = {name: site for name, site in adapter_sites(model).items() if site.experts}
    assert list(sites) == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    for name, site in sites.items():
        weight: Any = site.weight
        assert weight.per_expert and site.experts == 5
        assert site.a().shape == (5, 3, site.in_features) and site.b().shape == (5, site.out_features, 3)
        for expert, matrix in enumerate(plain.get_parameter(name)):
            alone = qc.quantize_4bit(matrix, block_size=32)
            assert torch.equal(weight[expert].codes, alone.codes)
            assert torch.equal(weight[expert].dequantize(), alone.dequantize())
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts"), QLoRAExperts)
    assert not is_quantized(model.get_parameter("model.layers.0.mlp.gate.weight"))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_both_doors_leave_the_same_state(implementation: str) -> None:
    """However the plain model's experts run: the backend changes their class and has the graph traced again."""
    one, other = (build("mixtral", implementation, **MIXTRAL) for _ in range(2))
    batch = inputs()
    torch.compile(one, backend="qlora", options=FP32)(**batch)
    qc.prepare(other, FP32)
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    for key, parameter in mine.items():
        assert parameter.requires_grad == theirs[key].requires_grad
        assert torch.equal(parameter, theirs[key])
    torch.testing.assert_close(one(**batch).logits, other(**batch).logits, atol=0, rtol=0)


def test_a_plain_model_is_compiled_once_and_in_one_graph() -> None:
    model = build("gpt_oss", **GPT_OSS)
    compiled = torch.compile(model, backend="qlora", options=FP32)
    counters.clear()
    batch = inputs()
    compiled(**batch).loss.backward()
    compiled(**batch).loss.backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    report = qc.explain(model)
    experts = [linear for linear in report.linears if "experts" in linear.name]
    assert [linear.shape for linear in experts] == [(5, 152, 48), (5, 48, 76)]
    chosen = {site: row.kernel for row in report.choices if row.op == "grouped_lora_linear" for site in row.modules}
    assert all(linear.lowering == chosen[linear.name] and 4.1 < linear.bits < 4.4 for linear in experts)
    assert next(p.rewrites for p in report.passes if p.name == "match_experts") == 2
    assert report.memory["bits_per_weight"] < 4.4
    assert "5 × 152 × 48" in str(report)


def test_double_quantization_off_and_several_adapters() -> None:
    model = prepared(build("mixtral", **MIXTRAL), double_quant=False)
    batch = inputs()
    one = model(**batch).logits
    from qlora_compile.adapter_edits import add_adapter

    sites = adapter_sites(model)
    add_adapter(model, "other", rank=2, alpha=4, scaling=dict.fromkeys(sites, 2.0))
    with torch.no_grad():
        for site in sites.values():
            site.b("other").normal_(std=0.05)
    both = model(**batch).logits
    assert not torch.allclose(one, both, atol=1e-3)
    torch.testing.assert_close(torch.compile(model, backend="qlora")(**batch).logits, both, **TOLERANCE)
    qc.set_adapters(model, {"default": 1.0})
    torch.testing.assert_close(model(**batch).logits, one, **TOLERANCE)


def test_quantize_only_adapters_only_and_exclusion() -> None:
    model = qc.prepare(build("mixtral", **MIXTRAL), FP32 | {"rank_pattern": {"experts.*": 0}})
    sites = adapter_sites(model)
    experts = [site for site in sites.values() if site.experts]
    assert len(experts) == 2 and not any(site.adapters for site in experts)
    model(**inputs()).loss.backward()

    dense = prepared(build("mixtral", **MIXTRAL), quantize=False)
    want = merged(dense, "mixtral", **MIXTRAL)
    batch = inputs()
    torch.testing.assert_close(torch.compile(dense, backend="qlora")(**batch).logits, want(**batch).logits, **TOLERANCE)

    model = qc.prepare(build("mixtral", **MIXTRAL), FP32 | {"exclude_modules": ["down_proj"]})
    assert [n for n, s in adapter_sites(model).items() if s.experts] == ["model.layers.0.mlp.experts.gate_up_proj"]
    compiled = torch.compile(model, backend="qlora")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, **TOLERANCE)
    declined = dict(next(p for p in qc.explain(model).passes if p.name == "match_experts").declined)
    assert declined["model.layers.0.mlp.experts.down_proj"] == "exclude_modules names it"

    model = build("mixtral", **MIXTRAL)
    torch.compile(model, backend="qlora", options=FP32 | {"target_modules": ["q_proj"]})(**batch)
    declined = dict(next(p for p in qc.explain(model).passes if p.name == "match_experts").declined)
    assert declined["model.layers.0.mlp.experts.gate_up_proj"] == "target_modules does not name it"


def test_example_inputs_and_a_layer_compiled_by_itself() -> None:
    batch = inputs()
    model = qc.prepare(build("mixtral", "eager", **MIXTRAL), FP32, batch)
    other = qc.prepare(build("mixtral", **MIXTRAL), FP32)
    assert adapter_sites(model).keys() == adapter_sites(other).keys()
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, atol=0, rtol=0)


def test_bf16_keeps_gradients_near_fp64() -> None:
    """One layer of experts alone, products in bf16."""
    model = prepared(build("mixtral", **MIXTRAL), compute_dtype="bfloat16", adapter_dtype="float32")
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    tokens = torch.randn(13, 48)
    index, weights = torch.randint(0, 4, (13, 2)), torch.rand(13, 2)  # expert 4 gets nothing
    wide = copy.deepcopy(merged(model, "mixtral", **MIXTRAL).get_submodule("model.layers.0.mlp.experts")).double()
    out = [
        module(x, index, w) for module, x, w in ((experts, tokens, weights), (wide, tokens.double(), weights.double()))
    ]
    # 8 bits of mantissa through two products and a gate: a few parts in 100 of the largest value
    scale = out[1].abs().max().item()
    torch.testing.assert_close(out[0].double(), out[1], atol=0.03 * scale, rtol=0)
    out[0].sum().backward()
    out[1].sum().backward()
    delta = wide.down_proj.grad  # d/dW; by the chain rule dB_e = scaling dW_e A_eᵀ
    want = 2.0 * delta @ experts.down_proj_lora_A["default"].double().mT
    got = experts.down_proj_lora_B["default"].grad
    torch.testing.assert_close(got.double(), want, atol=0.03 * want.abs().max().item(), rtol=0)
    assert not got[4].any() and got[0].any()


def test_the_tensor_as_state() -> None:
    weight = torch.randn(3, 7, 11, dtype=torch.bfloat16)
    q = qc.quantize_4bit(weight, block_size=32, per_expert=True)
    assert q.shape == weight.shape and q.stride() == weight.stride() and q.codes.shape == (3, 39)
    assert torch.equal(q, torch.stack([qc.quantize_4bit(w, block_size=32).dequantize() for w in weight]))
    assert torch.equal(q.mT, q.dequantize().mT)
    assert isinstance(q[1], qc.QuantizedTensor) and torch.equal(q[1], q.dequantize()[1])
    assert torch.equal(q[-1], q.dequantize()[2])
    file = io.BytesIO()
    torch.save({"w": nn.Parameter(q, requires_grad=False)}, file)
    file.seek(0)
    again = torch.load(file)["w"]
    assert again.per_expert and torch.equal(again, q)
    other = qc.quantize_4bit(torch.zeros_like(weight), block_size=32, per_expert=True)
    other.copy_(q)
    assert torch.equal(other.codes, q.codes) and torch.equal(other, q)
    other.copy_(weight)
    assert torch.equal(other, q)
    out = torch.empty(3, 7, 11, dtype=torch.bfloat16)
    assert torch.equal(qc.dequantize_4bit(q, out=out), q)
    assert copy.deepcopy(q).per_expert
    assert q.to(torch.float32).dtype == torch.float32
    with pytest.raises(InvalidWeightError, match="3-D"):
        qc.quantize_4bit(weight[0], per_expert=True)


def test_what_is_taken_for_experts() -> None:
    class Alike(nn.Module):
        """Has a 3-D parameter of that name, and none of the interface."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 5))
            self.head = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + torch.bmm(x.expand(3, -1, -1), self.gate_up_proj.mT).sum()

    model = Alike()
    assert expert_parameters(model) == ()
    torch.compile(model, backend="qlora", options=FP32)(torch.randn(2, 5))
    declined = dict(next(p for p in qc.explain(model).passes if p.name == "match_experts").declined)
    assert declined == {"gate_up_proj": "its weight has 3 dimensions"}
    assert expert_parameters(build("mixtral", **MIXTRAL).get_submodule("model.layers.0.mlp.experts")) == (
        "gate_up_proj",
        "down_proj",
    )


def _own_forward(model: nn.Module) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    class Scaled(MixtralExperts):
        def forward(self, *args: Any) -> Tensor:
            return 3.0 * super().forward(*args)

    model.get_submodule("model.layers.0.mlp.experts").__class__ = Scaled


def _own_implementation(model: nn.Module) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    def times(factor: float, *args: Any) -> Tensor:
        return factor * batched_mm_experts_forward(*args)

    ALL_EXPERTS_FUNCTIONS.register("thrice", functools.partial(times, 3.0))  # which is of no module
    model.set_experts_implementation("thrice")  # type: ignore[operator]


@pytest.mark.parametrize("change", [_own_forward, _own_implementation])
def test_experts_that_compute_something_of_their_own_go_on_computing_it(change: Callable[[nn.Module], None]) -> None:
    model, plain = (build("mixtral", "batched_mm", **MIXTRAL) for _ in range(2))
    change(model)
    batch = inputs()
    before = model(**batch).logits
    assert not torch.allclose(before, plain(**batch).logits, atol=1e-3)
    with pytest.warns(
        UserWarning, match=r"2 matrices of experts stay dense .*experts.gate_up_proj for one \(0.2 MB in all"
    ):
        qc.prepare(model, FP32 | {"r": 3, "quantize": False})
    assert torch.equal(model(**batch).logits, before)
    torch.compile(model, backend="qlora")(**batch)
    declined = dict(next(p for p in qc.explain(model).passes if p.name == "match_experts").declined)
    assert set(declined.values()) == {"its module runs its experts in a way of its own"} and len(declined) == 2


def test_linears_of_a_router_stay_dense() -> None:
    sizes: dict[str, Any] = {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
        "enable_moe_block": True,
    }
    heads = {"head_dim": 12, "global_head_dim": 12, "num_global_key_value_heads": 2, "hidden_size_per_layer_input": 0}
    model = build("gemma4_text", **sizes, **heads, sliding_window=8)
    router = model.get_submodule("model.layers.0.router")
    assert isinstance(router.proj, nn.Linear)
    qc.prepare(model, FP32)
    assert type(router.proj) is nn.Linear
    qc.prepare(model := build("gemma4_text", **sizes, **heads, sliding_window=8), FP32 | {"target_modules": ["proj"]})
    assert is_quantized(model.get_submodule("model.layers.0.router.proj").weight)


def test_a_trace_knows_experts_by_their_config_alone() -> None:
    # torch's grouped_mm, which the plain model is traced with first, wants rows of a multiple of 16 bytes
    sizes = SIZES | MIXTRAL | {"num_hidden_layers": 4, "intermediate_size": 80}
    config = transformers.AutoConfig.for_model("mixtral", **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros(2, 16, dtype=torch.long)
    report = qc.trace(model, {"input_ids": ids, "labels": ids, "use_cache": False}, {"r": 4})
    experts = [linear for linear in report.linears if "experts" in linear.name]
    assert len(experts) == 8 and all(linear.shape[0] == 5 and linear.bits < 4.3 for linear in experts)
    assert report.plan is not None
    ops = [event for event in report.plan.events if event.target.startswith("qlora.grouped_lora_linear")]
    assert len(ops) == 16 and all(event.flops for event in ops)  # two matrices, forward and backward, in four layers


def test_nan_in_an_expert_names_it() -> None:
    model = build("mixtral", **MIXTRAL)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[3, 1, 2] = float("nan")
    with pytest.raises(InvalidWeightError, match=r"experts\.down_proj"):
        qc.prepare(model, FP32)


def test_moving_and_evaluation_without_gradients() -> None:
    model = prepared(build("mixtral", **MIXTRAL)).eval()
    batch = inputs()
    with torch.no_grad():
        want = model(**batch).logits
    run: Callable[..., Any] = torch.inference_mode()(model)
    torch.testing.assert_close(run(**batch).logits, want, atol=0, rtol=0)
    assert model.to(torch.bfloat16).get_parameter("model.layers.0.mlp.experts.down_proj").dtype == torch.bfloat16
    assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize(("name", "method"), [("mixtral", "pissa"), ("gpt_oss", "olora"), ("gpt_oss", "loftq")])
def test_starts_that_take_from_the_weight_take_from_each_expert(name: str, method: str) -> None:
    plain = build(name, **(MIXTRAL if name == "mixtral" else GPT_OSS))
    dense = {key: parameter.detach().clone() for key, parameter in plain.named_parameters()}
    sites = adapter_sites(qc.prepare(plain, FP32 | {"init_lora_weights": method}))
    experts = {key: site for key, site in sites.items() if site.experts}
    assert len(experts) == 2
    for key, site in experts.items():
        alone = qc.quantize_4bit(dense[key], block_size=32, per_expert=True)
        delta = (site.b() @ site.a() * site.scaling()).detach()
        got = site.weight.dequantize() + (delta.mT if site.fan_in_fan_out else delta)
        for expert, matrix in enumerate(dense[key]):
            error, without = (got[expert] - matrix).norm(), (alone.dequantize()[expert] - matrix).norm()
            assert (
                0 < error < (4.0 if method == "olora" else 1.0) * without
            )  # OLoRA's base is larger than W, as for linears
        if method == "loftq":  # one round: the ordinary base
            assert torch.equal(site.weight.codes, alone.codes) and torch.equal(site.weight.absmax, alone.absmax)


def test_adapters_chosen_by_row() -> None:
    """Each row as if it were alone with its adapter, forward and backward."""
    model = prepared(build("mixtral", **MIXTRAL))
    add_adapter(model, "other", rank=2, alpha=4.0, scaling=dict.fromkeys(adapter_sites(model), 2.0))
    with torch.no_grad():
        for site in adapter_sites(model).values():
            site.b("other").normal_(std=0.05)
    ids, rows = inputs(3)["input_ids"], ["other", None, {"default": 0.5, "other": -1.0}]
    want = []
    for number, row in enumerate(rows):
        qc.set_adapters(model, row or {})
        want.append(model(ids[number : number + 1]).logits)
        (want[-1].square().mean() / 3).backward()
    gradients = [parameter.grad.clone() for parameter in adapter_parameters(model)]
    model.zero_grad()
    qc.set_adapters(model, adapter_ids=rows)
    for call in (model, torch.compile(model, backend="qlora", fullgraph=True)):
        got = call(ids).logits
        torch.testing.assert_close(got, torch.cat(want), **TOLERANCE)
        got.square().mean().backward()
        for parameter, gradient in zip(adapter_parameters(model), gradients, strict=True):
            atol = 2e-5 * float(gradient.abs().max()) + 1e-7
            torch.testing.assert_close(parameter.grad, gradient, atol=atol, rtol=1e-3)
        model.zero_grad()
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(ModelStateError, match="3 rows, this batch has 22 tokens"):
        experts(torch.randn(22, 48), torch.zeros(22, 2, dtype=torch.long), torch.ones(22, 2))


def test_a_budget_may_keep_a_matrix_of_experts_dense() -> None:
    """The squared error per bit chooses among linears and experts' matrices alike; its adapters train on the dense one."""
    model = build("mixtral", **MIXTRAL)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        experts.down_proj.mul_(30)
    config = qc.QLoRAConfig.from_options(FP32)
    chosen = with_dense_layers(model, config, 9.0)
    assert "model.layers.0.mlp.experts.down_proj" in chosen.dense_modules
    assert "model.layers.0.mlp.experts.gate_up_proj" not in chosen.dense_modules
    prepared(model, dense_modules=chosen.dense_modules)
    assert is_quantized(experts.gate_up_proj) and not is_quantized(experts.down_proj)
    batch = inputs()
    loss = model(**batch).loss
    torch.testing.assert_close(loss, merged(model, "mixtral", **MIXTRAL)(**batch).loss, **TOLERANCE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qlora")
    torch.testing.assert_close(compiled(**batch).loss, loss, **TOLERANCE)
