"""The pass manager: order, counts, declines, snapshots, dead code, provenance, dumps, and errors that name the pass."""

from __future__ import annotations

import ast
import functools
import gc
import operator
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qlora_compile as qc
from qlora_compile.backend import qlora
from qlora_compile.config import QLoRAConfig
from qlora_compile.errors import InvalidWeightError, PassError, UnknownOptionError
from qlora_compile.fx_utils import written
from qlora_compile.param_info import StateRef
from qlora_compile.pass_manager import NodeRecord, PassContext, insert_pass, run_passes, snapshot, target_name
from qlora_compile.passes import PIPELINE
from qlora_compile.state import ModelEdits


def _graph(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def _context(**options: Any) -> PassContext:
    config = QLoRAConfig(**options)
    return PassContext(config, ModelEdits(nn.Linear(5, 3), config))


def _cos_for_sin(gm: fx.GraphModule, ctx: PassContext) -> int:
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is torch.sin:
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(torch.cos, node.args)
            node.replace_all_uses_with(new)
            count += 1
    return count


def _nothing(gm: fx.GraphModule, ctx: PassContext) -> int:
    ctx.decline("layers.3.mlp", "it is Tuesday")
    return 0


# --- the pipeline ---


def test_the_pipeline_s_order() -> None:
    assert [p.__name__ for p in PIPELINE] == [
        "inline_checkpoints",
        "open_attention",
        "normalize_linear",
        "match_lora",
        "match_experts",
        "quantize_weights",
        "insert_adapters",
        "fuse_lora_linear",
        "group_linears",
        "chunk_cross_entropy",
        "widen_matmuls",
        "simplify_masks",
        "lower_attention",
        "lower_kernels",
        "outline_layers",
    ]


def test_insert_a_pass_before_or_after_a_named_one() -> None:
    before = insert_pass(PIPELINE, _nothing, before="inline_checkpoints")
    assert before == (_nothing, *PIPELINE)
    after = insert_pass(PIPELINE, _nothing, after="quantize_weights")
    place = [p.__name__ for p in PIPELINE].index("quantize_weights") + 1
    assert after == (*PIPELINE[:place], _nothing, *PIPELINE[place:])
    assert insert_pass(PIPELINE, _nothing, after="outline_layers")[-1] is _nothing


def test_insert_beside_an_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match=r"Unknown pass 'quantise_weights': did you mean 'quantize_weights'\?"):
        insert_pass(PIPELINE, _nothing, after="quantise_weights")


def test_a_pipeline_of_ones_own_goes_to_the_backend() -> None:
    def half_of_it(gm: fx.GraphModule, ctx: PassContext) -> int:
        """sin(x) -> sin(x) / 2"""
        for node in [n for n in gm.graph.nodes if n.target is torch.sin]:
            with gm.graph.inserting_after(node):
                half = gm.graph.call_function(torch.div, (node, 2))
            node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
        return 1

    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(37, 53)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.up(x))

    model, x = Wave(), torch.randn(3, 37)
    mine = functools.partial(qlora, pipeline=insert_pass(PIPELINE, half_of_it, after="fuse_lora_linear"))
    out = torch.compile(model, backend=mine, options={"lowering": "eager", "compute_dtype": "float32"})(x)
    torch.testing.assert_close(out, model(x) / 2)  # the same arithmetic on both sides
    names = [p.name for p in qc.explain(model).passes]
    assert names[names.index("half_of_it") + 1] == "group_linears"


@pytest.mark.parametrize("where", [{}, {"before": "match_lora", "after": "match_lora"}])
def test_insert_needs_one_place(where: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="either before or after"):
        insert_pass(PIPELINE, _nothing, **where)


# --- running ---


def test_passes_run_in_order_with_counts_times_and_reasons() -> None:
    gm = _graph(lambda x: torch.sin(x) + torch.sin(x * 2))
    result = run_passes(gm, _context(), (_nothing, _cos_for_sin, _nothing))
    assert [(p.name, p.rewrites) for p in result.passes] == [("_nothing", 0), ("_cos_for_sin", 2), ("_nothing", 0)]
    assert [p.declined for p in result.passes] == [
        (("layers.3.mlp", "it is Tuesday"),),
        (),
        (("layers.3.mlp", "it is Tuesday"),),
    ]
    assert all(p.ms > 0 for p in result.passes)
    assert [(p.nodes_before, p.nodes_after) for p in result.passes] == [(6, 6)] * 3
    x = torch.randn(3, 5)
    torch.testing.assert_close(gm(x), x.cos() + (x * 2).cos())  # recompiled


def test_what_a_pass_left_unused_is_dropped() -> None:
    gm = _graph(lambda x: torch.sin(x * 3))

    def use_x(gm: fx.GraphModule, ctx: PassContext) -> int:
        (sin,) = [node for node in gm.graph.nodes if node.target is torch.sin]
        sin.update_arg(0, next(iter(gm.graph.nodes)))
        return 1

    result = run_passes(gm, _context(), (use_x,))
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert (result.passes[0].nodes_before, result.passes[0].nodes_after) == (4, 3)


def test_unused_placeholders_stay() -> None:
    """The backend drops them together with their argument."""
    gm = _graph(lambda x, y: x + 1)
    run_passes(gm, _context(), (_nothing,))
    assert len([node for node in gm.graph.nodes if node.op == "placeholder"]) == 2


WRITES: dict[str, Callable[[Any], Any]] = {
    "method_": lambda h: h.mul_(2),
    "function_": lambda h: torch.relu_(h),
    "inplace=True": lambda h: F.relu(h, inplace=True),
    "inplace by position": lambda h: F.silu(h, True),
    "out=": lambda h: torch.mul(h, 2, out=h),
    "h += 1": lambda h: operator.iadd(h, 1),
    "h[0] = 1": lambda h: operator.setitem(h, 0, 1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_unused_calls_that_write_stay(name: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    h = graph.call_function(torch.clone, (x,))
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxy = fx.Proxy(h, tracer)
    if name == "out=":
        graph.call_function(torch.mul, (h, 2), {"out": h})
    elif name == "h += 1":
        graph.call_function(operator.iadd, (h, 1))
    elif name == "h[0] = 1":
        graph.call_function(operator.setitem, (h, 0, 1.0))
    elif name.startswith("inplace"):
        given = ((h, True), {}) if name == "inplace by position" else ((h,), {"inplace": True})
        graph.call_function(F.silu if name == "inplace by position" else F.relu, *given)
    else:
        WRITES[name](proxy)
    (write,) = [node for node in graph.nodes if node.op.startswith("call") and node is not h]
    graph.output(h)
    gm = fx.GraphModule(nn.Module(), graph)
    expected = torch.randn(3, 5)
    value = expected.clone()
    WRITES[name](expected)
    run_passes(gm, _context(), (_nothing, _cos_for_sin))
    torch.testing.assert_close(gm(value), expected, atol=0, rtol=0)
    assert written(write) is h


@pytest.mark.parametrize(
    "call",
    [
        lambda g, h: g.call_function(torch.mul, (h, 2)),
        lambda g, h: g.call_function(F.relu, (h,)),
        lambda g, h: g.call_method("__add__", (h, 1)),
        lambda g, h: g.call_function(operator.add, (h, 1)),
        lambda g, h: h,
    ],
    ids=["mul", "relu", "__add__", "add", "placeholder"],
)
def test_pure_calls_write_nothing(call: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    graph = fx.Graph()
    assert written(call(graph, graph.placeholder("h"))) is None


# --- provenance and snapshots ---


def test_new_nodes_are_stamped_with_each_pass_that_made_them() -> None:
    gm = _graph(lambda x: torch.sin(x) * 2)

    def sin_again(gm: fx.GraphModule, ctx: PassContext) -> int:
        (cos,) = [node for node in gm.graph.nodes if node.target is torch.cos]
        with gm.graph.inserting_before(cos):
            new = gm.graph.call_function(torch.sin, cos.args)
        new.meta = dict(cos.meta)
        cos.replace_all_uses_with(new)
        return 1

    result = run_passes(gm, _context(), (_cos_for_sin, sin_again))
    made_by = {record.target: record.made_by for record in result.stages["sin_again"]}
    assert made_by["sin"] == ("_cos_for_sin", "sin_again")
    assert made_by["mul"] == ()


def test_a_snapshot_for_the_input_and_after_each_pass() -> None:
    gm = _graph(lambda x: torch.sin(x))
    result = run_passes(gm, _context(), (_nothing, _cos_for_sin))
    assert list(result.stages) == ["input", "_nothing", "_cos_for_sin"]
    assert [record.target for record in result.stages["input"]] == ["x", "sin", "output"]
    assert result.stages["_nothing"] == result.stages["input"]
    assert [record.target for record in result.stages["_cos_for_sin"]] == ["x", "cos", "output"]


def test_a_record_holds_plain_values_and_no_tensor() -> None:
    graph = fx.Graph()
    node = graph.placeholder("w")
    node.meta["example_value"] = torch.zeros(4, 3, dtype=torch.bfloat16)
    node.meta["qlora_sites"] = ("up",)
    node.meta["nn_module_stack"] = {"1": ("L['self'].layers.0.up", nn.Linear)}
    node.meta["stack_trace"] = '  File "m.py", line 3, in forward\n    return self.up(x)\n'
    user = graph.call_method("t", (node,))
    graph.output(user)
    tensor = weakref.ref(node.meta["example_value"])
    first, second, _ = snapshot(graph)
    assert first == NodeRecord(
        "w", "placeholder", "w", (), "layers.0.up", 'File "m.py", line 3, in forward', (4, 3), "bfloat16", ("up",), ()
    )
    assert second.inputs == ("w",)
    assert (second.shape, second.dtype, second.module, second.source) == (None, None, "", "")
    del graph, node, user
    gc.collect()
    assert tensor() is None


def test_target_names() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = [
        target_name(graph.call_function(torch.ops.qlora.dequantize_4bit.default, (x,))),
        target_name(graph.call_function(torch.ops.aten.add.Tensor, (x, x))),
        target_name(graph.call_function(F.linear, (x, x))),
        target_name(graph.call_method("t", (x,))),
    ]
    assert names == ["qlora.dequantize_4bit", "aten.add.Tensor", "linear", "t"]


# --- state ---


def test_state_that_is_asked_for_twice_is_one_placeholder() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    ctx, tensor = _context(), torch.randn(4, 3)
    first = ctx.add_state(graph, StateRef("0.up.codes", tensor, lambda: tensor))
    again = ctx.add_state(graph, StateRef("0.up.codes", tensor, lambda: tensor))
    other = ctx.add_state(graph, StateRef("0.up.absmax", tensor, lambda: tensor))
    assert first is again
    assert other is not first
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["x", first.name, other.name]
    assert set(ctx.state) == {first.name, other.name}
    assert first.meta["example_value"].shape == (4, 3)
    assert first.meta["example_value"].device.type == "meta"
    assert fx.GraphModule(nn.Module(), graph)(1, 2, 3) == 1  # names that start with a digit are Python names


def test_state_for_a_graph_without_placeholders() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ones, (3,)))
    node = _context().add_state(graph, StateRef("w", torch.ones(3), lambda: torch.ones(3)))
    assert next(iter(graph.nodes)) is node


# --- errors ---


def test_a_pass_that_fails_is_named() -> None:
    def broken_pass(gm: fx.GraphModule, ctx: PassContext) -> int:
        raise KeyError("q_proj")

    with pytest.raises(PassError, match=r"^Pass 'broken_pass' failed: KeyError: 'q_proj'$") as caught:
        run_passes(_graph(lambda x: x + 1), _context(), (_nothing, broken_pass))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_breaks_the_graph_is_named_in_one_line() -> None:
    def use_before_definition(gm: fx.GraphModule, ctx: PassContext) -> int:
        first, second = [node for node in gm.graph.nodes if node.op == "call_function"]
        first.update_arg(0, second)
        return 1

    with pytest.raises(PassError, match="Pass 'use_before_definition' failed: RuntimeError: ") as caught:
        run_passes(_graph(lambda x: torch.sin(x) + 1), _context(), (use_before_definition,))
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_passes_unchanged() -> None:
    error = InvalidWeightError("up: NaN")

    def refuses(gm: fx.GraphModule, ctx: PassContext) -> int:
        raise error

    with pytest.raises(InvalidWeightError) as caught:
        run_passes(_graph(lambda x: x + 1), _context(), (refuses,))
    assert caught.value is error


# --- dumps ---


def test_dump_dir_holds_one_readable_file_for_each_stage(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"

    def sine(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    gm = _graph(sine)
    run_passes(gm, _context(dump_dir=str(folder)), (_nothing, _cos_for_sin))
    files = sorted((folder / "graph_00").iterdir())
    assert [path.name for path in files] == ["00_input.py", "01__nothing.py", "02__cos_for_sin.py"]
    texts = [path.read_text(encoding="utf-8") for path in files]
    for text in texts:
        ast.parse(text)
    assert "torch.sin(" in texts[0]
    assert "torch.cos(" in texts[2]
    assert "torch.sin(" not in texts[2]
