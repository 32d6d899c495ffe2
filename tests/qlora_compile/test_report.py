"""`explain(model)` -> CompileReport: as text, as JSON-ready values, as graphs."""

from __future__ import annotations

import ast
import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from toy_models import MLP, compile_model, seeded

import qlora_compile as qc
from qlora_compile.adapter_edits import add_adapter
from qlora_compile.errors import ModelStateError, UnknownOptionError
from qlora_compile.kernel_report import kernel_reports
from qlora_compile.modules import prepared_state
from qlora_compile.passes import PIPELINE
from qlora_compile.report import device_kernel_sources, used_kernels

OPTIONS: dict[str, Any] = {"lowering": "eager", "block_size": 32, "r": 3}


class Attention(nn.Module):
    """q [21, 37], k and v [10, 37] on one x, out [5, 31], and a head that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(37, 21), nn.Linear(37, 10), nn.Linear(37, 10)
        self.out, self.lm_head = nn.Linear(31, 5), nn.Linear(5, 50)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.q(x), F.silu(self.k(x)) * self.v(x)], dim=-1)
        return self.lm_head(self.out(h))


def _compiled(**options: Any) -> nn.Module:
    model = Attention()
    torch.compile(model, backend="qlora", fullgraph=True, options=OPTIONS | options)(torch.randn(2, 3, 37))
    return model


def test_passes_with_counts_and_reasons() -> None:
    report = qc.explain(_compiled())
    assert [(p.name, p.rewrites) for p in report.passes] == [
        ("inline_checkpoints", 0),
        ("open_attention", 0),
        ("normalize_linear", 0),
        ("match_lora", 0),
        ("match_experts", 0),
        ("quantize_weights", 4),
        ("insert_adapters", 4),
        ("fuse_lora_linear", 4),
        ("group_linears", 1),
        ("chunk_cross_entropy", 0),
        ("widen_matmuls", 0),
        ("simplify_masks", 0),
        ("lower_attention", 0),
        ("lower_kernels", 2),
        ("outline_layers", 0),
    ]
    assert next(p for p in report.passes if p.name == "quantize_weights").declined == (
        ("lm_head", "it is the output head"),
    )
    assert all(p.ms > 0 for p in report.passes)
    assert report.graphs == 1
    assert report.model == "Attention"
    assert report.config.r == 3


@pytest.mark.parametrize(("double_quant", "scale_bytes"), [(True, 25 + 4 + 4), (False, 25 * 4)])
def test_linears_with_shape_bits_rank_and_group(double_quant: bool, scale_bytes: int) -> None:
    report = qc.explain(_compiled(double_quant=double_quant, rank_pattern={"out": 2}))
    q, k, v, out = report.linears
    assert [linear.name for linear in report.linears] == ["q", "k", "v", "out"]
    assert (q.shape, k.shape, out.shape) == ((21, 37), (10, 37), (5, 31))
    assert q.group == k.group == v.group == ("q", "k", "v")
    assert out.group == ()
    assert (q.rank, out.rank) == ({"default": 3}, {"default": 2})
    assert q.bytes_before == 21 * 37 * 4
    assert q.bytes_after == 389 + scale_bytes  # 777 weights: 389 bytes of codes and 25 blocks of 32
    assert q.bits == pytest.approx((389 + scale_bytes) * 8 / 777)
    assert {linear.lowering for linear in report.linears} <= {"library_gemm", "fp32_gemm", "fused_fp32"}


def test_memory_before_and_after() -> None:
    model = _compiled()
    report, memory = qc.explain(model), qc.explain(model).memory
    dense = 4 * sum(n * k for n, k in [(21, 37), (10, 37), (10, 37), (5, 31)])
    rest = 4 * (21 + 10 + 10 + 5 + 5 * 50 + 50)
    assert memory["linears_before"] == dense
    assert memory["linears_after"] == sum(linear.bytes_after for linear in report.linears)
    assert memory["model_before"] == dense + rest
    assert memory["model_after"] == memory["linears_after"] + rest
    assert memory["trainable"] == 4 * 3 * (21 + 37 + 2 * (10 + 37) + 5 + 31)
    assert memory["bits_per_weight"] == pytest.approx(memory["linears_after"] * 8 / (dense / 4))


def test_double_quantized_blocks_of_64_need_at_most_4_13_bits_a_weight() -> None:
    model = qc.prepare(nn.Sequential(nn.Linear(1030, 515, bias=False)), {"r": 2})
    (linear,) = qc.explain(model).linears
    assert 4.125 < linear.bits <= 4.13  # codes 4, scales 8 bits for 64 weights; the scales' scales are the rest


def test_printed_text() -> None:
    model = _compiled()
    add_adapter(model, "second", rank=2, alpha=4, scaling={"q": 2.0, "k": 2.0, "v": 2.0, "out": 2.0})
    text = io.StringIO()
    qc.explain(model).print(text)
    lines = text.getvalue().splitlines()

    def row(start: str) -> str:
        return next(line for line in lines if line.lstrip("│├└─ ").startswith(start))

    for name in [p.__name__ for p in PIPELINE]:
        assert name in row(name)
    assert "4" in row("quantize_weights")
    assert "skip lm_head: it is the output head" in row("quantize_weights")
    assert all(part in row("q ") for part in ("21 × 37", "3, second: 2", "q + k + v", "_gemm"))
    assert any(line.startswith("bits per weight: 4.") for line in lines)
    assert any(line.startswith("linears before: 0.0 MB") for line in lines)
    assert str(qc.explain(model)) == text.getvalue()


def test_many_declined_rewrites_are_shortened() -> None:
    model = nn.Sequential(*[nn.Linear(37, 37, bias=bool(i % 2)) for i in range(7)])
    torch.compile(model, backend="qlora", options=OPTIONS | {"target_modules": ["0"]})(torch.randn(3, 37))
    text = str(qc.explain(model))
    assert text.count("target_modules does not name it") == 4
    assert "... and 2 more" in text


def test_dict_is_json() -> None:
    report = qc.explain(_compiled())
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["model"] == "Attention"
    assert plain["config"] == report.config.to_dict()
    assert [p["name"] for p in plain["passes"]] == [p.__name__ for p in PIPELINE]
    assert next(p for p in plain["passes"] if p["name"] == "quantize_weights")["declined"] == [
        ["lm_head", "it is the output head"]
    ]
    assert plain["linears"][0]["group"] == ["q", "k", "v"]
    assert plain["linears"][0]["shape"] == [21, 37]
    assert plain["stages"] == ["input", *[p.__name__ for p in PIPELINE]]


def test_networkx_graph_of_a_stage() -> None:
    report = qc.explain(_compiled())
    before, after = report.to_networkx("input"), report.to_networkx("group_linears")
    assert (before.name, after.name) == ("input", "group_linears")
    targets = [fields["target"] for _, fields in before.nodes(data=True)]
    assert targets.count("linear") == 5
    ops = {fields["sites"]: name for name, fields in after.nodes(data=True) if fields["target"] == "qlora.lora_linear"}
    assert set(ops) == {("q", "k", "v"), ("out",)}
    group = ops["q", "k", "v"]
    assert after.nodes[group]["module"] == "q"
    assert "forward" in after.nodes[group]["source"]
    assert after.nodes[group]["made_by"][-1] == "group_linears"
    (x,) = [name for name, fields in after.nodes(data=True) if fields["shape"] == (2, 3, 37)]
    assert after.has_edge(x, group)
    assert after.in_degree(group) == 1 + 3 * (4 + 1 + 2 + 1)  # x; codes and scales, bias, A and B, weight of each
    assert after.out_degree(group) == 3
    assert [name for name in after if after.degree(name) == 0] == [
        name for name, fields in after.nodes(data=True) if fields["op"] == "placeholder" and not after.degree(name)
    ]


def test_an_unknown_stage_names_the_nearest() -> None:
    report = qc.explain(_compiled())
    with pytest.raises(UnknownOptionError, match=r"Unknown stage 'group_linear': did you mean 'group_linears'\?"):
        report.to_networkx("group_linear")


def test_a_prepared_model_that_was_not_compiled() -> None:
    report = qc.explain(qc.prepare(Attention(), OPTIONS))
    assert report.passes == []
    assert report.graphs == 0
    assert {linear.lowering for linear in report.linears} == {"not compiled yet"}
    assert "not compiled yet" in str(report)


def test_rank_zero_and_a_dense_base() -> None:
    report = qc.explain(_compiled(r=0))
    assert [linear.rank for linear in report.linears] == [{}] * 4
    assert report.memory["trainable"] == 0
    torch._dynamo.reset()
    report = qc.explain(_compiled(quantize=False))
    assert {linear.bits for linear in report.linears} == {32.0}
    assert {linear.lowering for linear in report.linears} <= {"library_gemm", "fp32_gemm", "fused_fp32"}


def test_a_plain_model_has_nothing_to_explain() -> None:
    with pytest.raises(ModelStateError, match=r"nothing to explain yet: call the compiled model once, or prepare"):
        qc.explain(Attention())


def test_the_compiled_model_can_be_given_too() -> None:
    compiled = torch.compile(Attention(), backend="qlora", options=OPTIONS)
    compiled(torch.randn(2, 3, 37))
    assert qc.explain(compiled).to_dict() == qc.explain(compiled._orig_mod).to_dict()


def test_the_largest_of_several_graphs_is_shown() -> None:
    class Pieces(Attention):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.q(x), F.silu(self.k(x)) * self.v(x)], dim=-1)
            torch._dynamo.graph_break()
            return self.out(h)

    model = Pieces()
    torch.compile(model, backend="qlora", options=OPTIONS)(torch.randn(2, 3, 37))
    report = qc.explain(model)
    assert report.graphs == 2
    assert report.linears[0].group == ("q", "k", "v")
    assert {p.name: p.rewrites for p in report.passes}["fuse_lora_linear"] == 3
    assert report.linears[3].lowering.endswith("_gemm")  # though it stands in the other graph


def test_the_report_keeps_no_graph_and_no_dense_weight_alive() -> None:
    model = Attention()
    weight = weakref.ref(model.q.weight)
    torch.compile(model, backend="qlora", options=OPTIONS)(torch.randn(2, 3, 37))
    report = qc.explain(model)
    gc.collect()
    assert weight() is None
    assert report.stages["input"][0].shape == (21, 37)


def test_dump_dir_through_the_backend(tmp_path: Path) -> None:
    model = Attention()
    compiled = torch.compile(model, backend="qlora", options=OPTIONS | {"dump_dir": tmp_path})
    compiled(torch.randn(2, 3, 37))
    compiled(torch.randn(2, 4, 37))  # another graph, in a folder of its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph_00", "graph_01"]
    names = ["input", *[p.__name__ for p in PIPELINE]]
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "graph_00").iterdir()}
    assert sorted(files) == [f"{number:02d}_{name}.py" for number, name in enumerate(names)]
    for text in files.values():
        ast.parse(text)
    assert files["00_input.py"].count("torch._C._nn.linear(") == 5
    assert (
        files[f"{names.index('group_linears'):02d}_group_linears.py"].count("torch.ops.qlora.lora_linear.default(") == 2
    )


def test_kernels_are_source_text() -> None:
    report = qc.explain(_compiled())
    assert all("qlora" in text for text in report.kernels.values())
    from qlora_compile.runtime import kernels

    if kernels.find("dequantize_4bit", "cpu") is not None:
        assert "dequantize_4bit" in report.kernels


def test_a_gpus_kernels_are_those_launched_by_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At compile time nothing is generated yet; and the newest file of a cache may be another model's."""
    pytest.importorskip("triton", reason="triton is not installed: `pip install triton` (Linux)")
    from qlora_compile.runtime import kernels
    from qlora_compile.runtime.kernels import dispatch, triton_build

    monkeypatch.setenv("QLORA_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_build, "_loaded", {})
    triton_build.load.cache_clear()
    triton_build.write_source.cache_clear()
    parts = ("lora_down", "lora_up", "lora_linear_gemm")
    problem = dispatch.Problem("lora_linear", 64, (21,), 96, 8, torch.bfloat16, "nf4", 32, "cuda")
    choice = dispatch.Choice(problem, dispatch.Candidate("lora_linear", "triton_gemm", None, kernels=parts), "forced")
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta |= {"qlora_kernels": [("lora_linear", choice)], "qlora_sites": ("q",)}
    graph.output(x)
    model = _compiled()
    state = prepared_state(model)
    assert state is not None
    state.reports[0].choices = kernel_reports(fx.GraphModule(nn.Module(), graph))
    (report,) = qc.explain(model).choices
    assert report.parts == parts and report.sources == {} and report.modules == ("q",)

    spec = {"adapters": 1, "dropout": False, "scaled": False, "scaling": False, "uses_codes": False}
    for adapters in (1, 2):
        triton_build.load("lora_down", **spec | {"adapters": adapters})
    triton_build.load("lora_up", **spec, base="y", bias=False)
    newer = tmp_path / "lora_down-of-another-process.py"
    newer.write_text("")
    monkeypatch.setattr(kernels, "find", lambda op, device: None)  # no GPU is here to prove a kernel on
    (report,) = qc.explain(model).choices
    files = report.sources["lora_down"]
    assert report.sources.keys() == {"lora_down", "lora_up"} and len(files) == 2 and str(newer) not in files
    texts = device_kernel_sources("cuda", used_kernels(qc.explain(model)))
    assert texts.keys() == {"lora_down", "lora_up"} and all(f"adapters={n}," in texts["lora_down"] for n in (1, 2))
    assert all(Path(file).read_text(encoding="utf-8") in texts["lora_down"] for file in files)
    triton_build.load.cache_clear()  # its files go with the test's folder
    triton_build.write_source.cache_clear()


def test_a_llama(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama(num_hidden_layers=2)
    torch.compile(model, backend="qlora", fullgraph=True, options=OPTIONS)(input_ids=torch.randint(3, 211, (2, 7)))
    report = qc.explain(model)
    groups = {linear.group for linear in report.linears}
    layer = "model.layers.1"
    attention = tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")
    assert {attention, (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"), ()} <= groups
    assert {p.name: p.rewrites for p in report.passes}["group_linears"] == 4
    assert next(p for p in report.passes if p.name == "quantize_weights").declined == (
        ("model.embed_tokens", "its weight is tied to the embedding 'model.embed_tokens'"),
    )


def test_modules_are_named_from_the_model_behind_a_wrapped_forward() -> None:
    class Wrapped(MLP):
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return MLP.forward(*args, **kwargs)

    model = seeded(Wrapped)
    compile_model(model)(torch.randn(2, 37))
    modules = {record.module for record in qc.explain(model).stages["fuse_lora_linear"]}
    assert {"up", "down"} <= modules <= {"", "up", "down"}
