"""inline_checkpoints: what activation checkpointing hides in subgraphs -> the flat graph, marked to be computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCachePickler, sanitize_gm_for_cache
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import qlora_compile as qc
import qlora_compile.backend
from qlora_compile.errors import ModelStateError
from qlora_compile.fx_utils import RECOMPUTE, recomputed
from qlora_compile.modules import adapter_parameters, adapter_sites
from qlora_compile.passes import PIPELINE, inline_checkpoints

FP32 = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5, "lowering": "aot_eager"}
WIDTH = 21


class Square(torch.autograd.Function):
    """Dynamo makes an operator with subgraphs of its own of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


class Layer(nn.Module):
    """Gated, with a custom autograd function; `up` and `gate` share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 34), nn.Linear(WIDTH, 34)
        self.down = nn.Linear(34, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h)) * Square.apply(torch.tanh(self.gate(h))))


class Model(nn.Module):
    """Three layers, each called through `wrap` (activation checkpointing, or nothing)."""

    def __init__(self, wrap: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.wrap is None else self.wrap(layer, x)
        return x


CHECKPOINT = partial(checkpoint, use_reentrant=False)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(wrap: Callable[..., Any] | None) -> Model:
    torch.manual_seed(2)
    return Model(wrap)


def _saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What autograd keeps for backward, every storage once and no parameter's, and the result."""
    kept: dict[int, torch.UntypedStorage] = {}
    stored = [t for p in model.parameters() for t in ([p] if type(p) is nn.Parameter else [p.codes, p.absmax])]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in stored}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in pointers), y


def _step(model: nn.Module, compiled: Any, x: Tensor, fill: Callable[[nn.Module], None]) -> tuple[int, list[Tensor]]:
    compiled(x)
    fill(model)
    kept, y = _saved_bytes(model, lambda: compiled(x))
    y.square().sum().backward()
    return kept, [y.detach(), *(p.grad for p in adapter_parameters(model) if p.grad is not None)]


def test_the_contents_take_the_place_of_the_call(traced: Callable[..., Any]) -> None:
    t = traced(_model(CHECKPOINT), torch.randn(5, WIDTH))
    assert t.targets().count("tag_activation_checkpoint") == 3 and not t.nodes("linear")
    before = t()
    assert t.count(inline_checkpoints) == 3
    assert "tag_activation_checkpoint" not in t.targets() and len(t.nodes("linear")) == 9
    assert {node.meta["ac_graph_id"] for node in t.nodes("linear")} == {1, 2, 3}
    torch.testing.assert_close(t(), before, rtol=0, atol=0)
    assert t.count(inline_checkpoints) == 0


def test_checkpoints_in_one_another_are_one_region(traced: Callable[..., Any]) -> None:
    t = traced(_model(lambda layer, x: CHECKPOINT(lambda x: CHECKPOINT(layer, x) + 1, x)), torch.randn(5, WIDTH))
    before = t()
    assert t.count(inline_checkpoints) == 6
    assert {node.meta["ac_graph_id"] for node in t.nodes("linear")} == {1, 2, 3}
    torch.testing.assert_close(t(), before, rtol=0, atol=0)


def test_every_fused_op_is_marked(traced: Callable[..., Any]) -> None:
    t = traced(_model(CHECKPOINT), torch.randn(5, WIDTH))
    t.run(*PIPELINE)
    fused = t.nodes("lora_linear")
    assert [len(node.meta["qlora_sites"]) for node in fused] == [2, 1] * 3
    assert all(key in node.meta for node in fused for key in RECOMPUTE)


def test_selective_checkpointing_stays_and_says_why(traced: Callable[..., Any]) -> None:
    def context() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    model = _model(partial(CHECKPOINT, context_fn=context))
    t = traced(model, torch.randn(5, WIDTH))
    reasons = t.declined(inline_checkpoints)
    assert (
        list(reasons.values())
        == [
            "nothing inside it is fused: its context_fn chooses what is kept (activation_budget does so for the whole graph)"
        ]
        * 3
    )
    with pytest.raises(ModelStateError, match=r"layers\.0\.\w+ is used inside tag_activation_checkpoint.*prepare\("):
        torch.compile(model, backend="qlora", options=FP32)(torch.randn(5, WIDTH))


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("outline", [True, False])
def test_numbers_and_memory(prepared: bool, outline: bool, fill_adapters: Callable[[nn.Module], None]) -> None:
    x, options, found = torch.randn(40, WIDTH), FP32 | {"outline_layers": outline}, {}
    for wrap in (None, CHECKPOINT):
        model = _model(wrap)
        if prepared:
            qc.prepare(model, options)
        compiled = torch.compile(model, backend="qlora", options=None if prepared else options, fullgraph=True)
        found[wrap] = _step(model, compiled, x, fill_adapters)
        assert len(adapter_sites(model)) == 9
    for ours, flat in zip(found[CHECKPOINT][1], found[None][1], strict=True):
        torch.testing.assert_close(ours, flat, rtol=0, atol=0)  # the same ops in the same order, some of them twice
    layer_inputs, scales = 3 * 40 * WIDTH * 4, 9 * 1100  # each weight's 256-entry table of scales, and what is 0-dim
    assert found[CHECKPOINT][0] < layer_inputs + scales < found[None][0] / 2


def test_as_little_is_kept_as_torch_keeps(fill_adapters: Callable[[nn.Module], None]) -> None:
    kept = {}
    for backend in ("qlora", "aot_eager"):
        model = qc.prepare(_model(CHECKPOINT), FP32)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        kept[backend] = _step(model, compiled, torch.randn(40, WIDTH), fill_adapters)[0]
    assert kept["qlora"] <= kept["aot_eager"]


def test_gradient_checkpointing_of_transformers(fill_adapters: Callable[[nn.Module], None]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 76, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids, found = torch.randint(3, 99, (2, 11)), {}
    for checkpointing in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=101)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compiled = torch.compile(model, backend="qlora", options=FP32, fullgraph=True)
        compiled(input_ids=ids, labels=ids, use_cache=False)
        fill_adapters(model)
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[checkpointing] = [loss.detach(), *(p.grad for p in adapter_parameters(model))]
        rewrites = {one.name: one.rewrites for one in qc.explain(model).passes}
        assert rewrites["inline_checkpoints"] == (2 if checkpointing else 0)
        assert (rewrites["fuse_lora_linear"], rewrites["group_linears"]) == (14, 4)
    for ours, flat in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, flat, rtol=0, atol=0)  # the same ops in the same order, some of them twice


@pytest.mark.parametrize("lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_adapters_drop_the_same_inputs_in_backward(lowering: str, fill_adapters: Callable[[nn.Module], None]) -> None:
    """One row: a dropped input leaves a column of A without gradient, and that column out of the output."""
    model = nn.Sequential(nn.Linear(WIDTH, 34, bias=False))
    options = FP32 | {"lora_dropout": 0.4, "lowering": lowering}
    compiled = torch.compile(lambda x: CHECKPOINT(model, x).sin(), backend="qlora", options=options)
    x = torch.randn(1, WIDTH)
    compiled(x)
    fill_adapters(model)
    y = compiled(x)
    y.square().sum().backward()
    site = adapter_sites(model)["0"]
    a, b = site.a(), site.b()
    kept = a.grad.abs().sum(0) > 0
    assert 0 < kept.sum() < WIDTH
    delta = F.linear(F.linear(x * kept / 0.6, a), b) * site.scaling() * site.adapter_weight()
    expected = F.linear(x, qc.dequantize_4bit(site.weight)) + delta
    torch.testing.assert_close(y, expected.sin(), rtol=1e-5, atol=1e-5)  # fp32, 21 terms


@pytest.mark.parametrize("lowering", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_models_own_dropout_is_the_same_in_backward(lowering: str) -> None:
    """One row: a dropped output is zero, and leaves a row of B without gradient."""
    model = nn.Sequential(nn.Linear(WIDTH, 34, bias=False), nn.Dropout(0.5))
    compiled = torch.compile(
        lambda x: CHECKPOINT(model, x).sin(), backend="qlora", options=FP32 | {"lowering": lowering}
    )
    x = torch.randn(1, WIDTH)
    for _ in range(3):
        model.zero_grad()
        y = compiled(x)
        y.square().sum().backward()
        kept = y[0] != 0
        assert 0 < kept.sum() < 34
        assert torch.equal(adapter_sites(model)["0"].b().grad.abs().sum(1) > 0, kept)


def test_a_marked_region_is_put_in_line_too(traced: Callable[..., Any]) -> None:
    region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))
    t = traced(_model(region), torch.randn(5, WIDTH))
    before = t()
    marked = len(t.nodes("invoke_subgraph"))
    assert marked in (2, 3)  # Dynamo itself puts the first in line (torch 2.11: none)
    assert t.count(inline_checkpoints) == marked
    assert not t.nodes("invoke_subgraph") and len(t.nodes("linear")) == 9
    assert not recomputed(t.gm)
    torch.testing.assert_close(t(), before, rtol=0, atol=0)


def test_the_cache_tells_a_checkpointed_model_from_a_flat_one() -> None:
    """AOTAutograd's key reads no meta, of nodes or graph: the backend writes the marks where it does read."""
    keys = []
    for wrap in (None, CHECKPOINT):
        model = nn.Sequential(nn.Linear(WIDTH, 34))
        seen: list[Any] = []

        def lower(gm: Any, inputs: Any) -> Any:
            with sanitize_gm_for_cache(gm):  # as AOTAutograd computes its key
                seen.append(AOTAutogradCachePickler(gm).dumps(gm))  # noqa: B023
            return gm.forward

        backend = partial(qc.backend.qlora, options=FP32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qc.backend, "lowering", lambda config, backward: lower)
            torch.compile(model if wrap is None else partial(wrap, model), backend=backend)(torch.randn(5, WIDTH))
        keys += seen
    assert len(keys) == 2 and keys[0] != keys[1]
