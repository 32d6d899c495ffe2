"""What the backend leans on in Dynamo and AOTAutograd, one small test a line: a new torch says here what it broke.

The first half uses torch alone; a backend is written out where the line needs one. The second half pins the wrappers in
`qlora_compile.dynamo` and `fx_utils` and the whole backend on models of one or two linears.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.source import SyntheticLocalSource

from qlora_compile import dynamo, errors, fx_utils
from qlora_compile.errors import ConfigError, QLoRACompileError, UnknownOptionError
from qlora_compile.modules import QLoRALinear, adapter_sites, prepared_state
from qlora_compile.tensor import QuantizedTensor, quantize_4bit

FP32 = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lowering": "aot_eager"}


class Two(nn.Module):
    """13 -> 22 -> 7, neither width a multiple of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(13, 22)
        self.down = nn.Linear(22, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def capture(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend, with its metadata as it is inside the call."""
    found: list[tuple[list[Any], list[str], fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((dynamo.real_inputs(gm), dynamo.source_names(gm), gm))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    ((real, names, gm),) = found
    gm.meta["test_real"], gm.meta["test_names"] = real, names
    return gm


# --- what a placeholder carries ---


def test_placeholders_carry_the_real_parameters_and_their_names():
    model = Two()
    gm = capture(model, torch.randn(3, 13))
    by_name = dict(zip(gm.meta["test_names"], gm.meta["test_real"], strict=True))
    weights = {name: value for name, value in by_name.items() if "_parameters" in name}
    assert {id(value) for value in weights.values()} == {id(p) for p in model.parameters()}
    (name,) = (name for name, value in weights.items() if value is model.down.weight)
    assert name.endswith("._modules['down']._parameters['weight']")


def test_a_parameter_used_twice_is_one_placeholder():
    model = Two()
    model.forward = lambda x: F.linear(x, model.up.weight) + F.linear(2 * x, model.up.weight)  # type: ignore[method-assign]
    gm = capture(model, torch.randn(3, 13))
    assert sum(value is model.up.weight for value in gm.meta["test_real"]) == 1


def test_the_traced_frame_is_found_through_output_graph():
    """`root_modules` walks the callers of the backend for Dynamo's OutputGraph and its `local_scope`."""
    model, found = Two(), []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        scopes = dynamo._frame_scopes()
        assert scopes is not None
        found.append((dynamo.root_modules(gm), set(scopes["L"])))
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(3, 13))
    (([root], local_names),) = found
    assert root is model
    assert {"self", "x"} <= local_names


def test_no_traced_frame_outside_a_backend():
    assert dynamo._frame_scopes() is None


# --- editing a copy of the graph ---


def test_a_copied_graph_with_a_new_placeholder_passes_aot_autograd():
    """Sources are carried over by `copy_graph`, the new placeholder has one of its own: AOTAutograd checks both."""
    model, extra = Two(), nn.Parameter(torch.randn(7))
    x = torch.randn(3, 13, requires_grad=True)
    expected = model(x) + extra.detach()
    untouched: list[bool] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        work = fx_utils.copy_graph(gm)
        assert all(node._dynamo_source is not None for node in fx_utils.placeholders(work.graph))
        new = fx_utils.add_placeholder(work.graph, "0.extra", extra)
        assert isinstance(new._dynamo_source, SyntheticLocalSource)
        (output,) = (node for node in work.graph.nodes if node.op == "output")
        (y,) = output.args[0]
        output.args = ((fx_utils.emit(output, torch.add, (y, new), y),),)
        work.recompile()
        inner = aot_eager(work, [*example_inputs, extra])
        untouched.append(str(gm.graph) == before)
        return lambda *args: inner(*args, extra)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y = compiled(x)
    y.square().sum().backward()
    assert untouched == [True]
    # fp32 products of at most 22 terms
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(extra.grad, 2 * expected.detach().sum(0), rtol=1e-5, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters())


def test_a_copied_graph_keeps_no_parameter_alive():
    gm = capture(Two(), torch.randn(3, 13))
    copy = fx_utils.copy_graph(gm)
    assert all("grapharg" not in node.meta for node in copy.graph.nodes)


def test_dead_placeholders_may_be_dropped_with_their_argument():
    model, seen = Two(), []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        work = fx_utils.copy_graph(gm)
        inputs = fx_utils.placeholders(work.graph)
        bias = next(i for i, value in enumerate(dynamo.real_inputs(gm)) if value is model.up.bias)
        for user in list(inputs[bias].users):
            user.args = tuple(None if arg is inputs[bias] else arg for arg in user.args)
        work.graph.erase_node(inputs[bias])
        work.recompile()
        kept = [i for i in range(len(inputs)) if i != bias]
        inner = aot_eager(work, [example_inputs[i] for i in kept])
        seen.append(len(inputs) - len(kept))
        return lambda *args: inner(*[args[i] for i in kept])

    x = torch.randn(3, 13)
    y = torch.compile(model, backend=backend)(x)
    assert seen == [1]
    expected = model.down(torch.relu(F.linear(x, model.up.weight)))
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # the same fp32 products


# --- changing the model inside the backend ---


class Swapped(nn.Linear):
    """A class that the backend gives to a linear; its forward uses a parameter that the old class had not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.extra


def swap_in_backend(model: nn.Linear) -> tuple[Callable[..., Any], list[int]]:
    """A compiled `model` whose backend quantizes the weight, registers `extra` and assigns the class; traces counted."""
    traces: list[int] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        traces.append(len(fx_utils.placeholders(gm.graph)))
        if not isinstance(model, Swapped):
            model._parameters["weight"] = nn.Parameter(quantize_4bit(model.weight), requires_grad=False)
            model.extra = nn.Parameter(torch.zeros(model.out_features))
            model.__class__ = Swapped
        return gm.forward

    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False), traces


def test_swapping_weight_and_class_and_adding_parameters_recompiles_nothing():
    model = nn.Linear(13, 22)
    compiled, traces = swap_in_backend(model)
    for _ in range(3):
        compiled(torch.randn(3, 13))
    assert isinstance(model, Swapped) and isinstance(model.weight, QuantizedTensor)
    assert traces == [3]  # x, weight, bias: as traced before the swap


def test_a_deleted_parameter_does_recompile():
    """The counterpart: guards are on what is on the module after the backend. If this fails, the test above is void."""
    model = nn.Linear(13, 22)
    compiled, traces = swap_in_backend(model)
    compiled(torch.randn(3, 13))
    model.bias = None
    compiled(torch.randn(3, 13))
    assert len(traces) == 2


def test_a_retrace_for_a_new_length_sees_one_placeholder_per_quantized_tensor():
    model = nn.Linear(13, 22)
    model.weight = nn.Parameter(quantize_4bit(model.weight.detach()), requires_grad=False)
    kinds: list[list[type]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        kinds.append([type(value) for value in dynamo.real_inputs(gm) if isinstance(value, nn.Parameter)])
        return aot_eager(gm, example_inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(3, 5, 13, requires_grad=True)
    for tokens in (5, 6, 7):
        y = compiled(x[:, :1].expand(3, tokens, 13))
    assert len(kinds) == 2  # the first length, then dynamic
    for kind in kinds:
        assert sum(issubclass(k, QuantizedTensor) for k in kind) == 1
        assert len(kind) == 2  # and the bias
    torch.testing.assert_close(y, model(x[:, :1].expand(3, 7, 13)), rtol=1e-6, atol=1e-6)  # the same products
    y.sum().backward()
    assert x.grad is not None


# --- AOTAutograd's cache ---

_HASH = """
import torch
from qlora_compile.tensor import quantize_4bit
print(quantize_4bit(torch.randn(5, 77, generator=torch.Generator().manual_seed({seed})))._stable_hash_for_caching())
"""


def test_the_cache_hash_is_stable_across_processes_and_values():
    mine = quantize_4bit(torch.randn(5, 77))._stable_hash_for_caching()
    code = _HASH.format(seed=3)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mine


def test_the_cache_hash_tells_layouts_apart():
    weight = torch.randn(5, 77)
    variants = [
        quantize_4bit(weight),
        quantize_4bit(weight.view(7, 55)),
        quantize_4bit(weight.half()),
        quantize_4bit(weight, quant_type="fp4"),
        quantize_4bit(weight, block_size=128),
        quantize_4bit(weight, double_quant=False),
        quantize_4bit(weight, transposed=True),
        quantize_4bit(weight.t().contiguous().t()),
    ]
    assert len({q._stable_hash_for_caching() for q in variants}) == len(variants)


# --- errors and options ---


def _error_classes() -> list[type[QLoRACompileError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [kind for kind in found if issubclass(kind, QLoRACompileError)]


@pytest.mark.parametrize("kind", _error_classes())
def test_each_of_our_errors_leaves_the_backend_unwrapped(kind: type[QLoRACompileError]):
    made = {"UnknownOptionError": ("rnak", ["rank"]), "MissingDependencyError": ("gguf", "gguf", "Reading GGUF")}
    error = kind(*made.get(kind.__name__, ("the sentence",)))

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        raise dynamo.surfaced(error)

    with pytest.raises(kind) as caught:
        torch.compile(Two(), backend=backend)(torch.randn(3, 13))
    assert str(caught.value) == str(error)
    assert type(caught.value).__name__ == kind.__name__
    assert caught.value.exit_code == kind.exit_code


def test_any_other_error_is_wrapped_by_dynamo():
    """Why `surfaced` exists. If this fails it can go."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        raise ConfigError("the sentence")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(Two(), backend=backend)(torch.randn(3, 13))


def test_options_reach_the_backend():
    with pytest.raises(UnknownOptionError, match="lora_alpha"):
        torch.compile(Two(), backend="qlora", options={"lora_alhpa": 4})(torch.randn(3, 13))


_BY_NAME = """
import sys, torch
model = torch.nn.Linear(13, 22)
assert not any(name.startswith("qlora_compile") for name in sys.modules)
compiled = torch.compile(model, backend="qlora", options={"r": 3, "lowering": "eager"})
y = compiled(torch.randn(4, 13))
print(type(model).__name__, tuple(model.lora_A["default"].shape), tuple(y.shape))
"""


def test_the_backend_is_found_by_name_without_an_import_of_ours():
    done = subprocess.run([sys.executable, "-c", _BY_NAME], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QLoRALinear (3, 13) (4, 22)"


# --- the whole backend on those lines ---


def test_the_first_call_edits_the_model_and_later_calls_recompile_nothing():
    model = Two()
    compiled = torch.compile(model, backend="qlora", options=FP32, fullgraph=True)
    compiled(torch.randn(3, 13))
    assert isinstance(model.up, QLoRALinear) and isinstance(model.up.weight, QuantizedTensor)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(torch.randn(3, 13)).sum().backward()
    grads = {name: p.grad is not None for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 4 and all(grads.values())


def test_compiled_gradients_are_the_eager_ones_and_a_retrace_keeps_them():
    model = Two()
    compiled = torch.compile(model, backend="qlora", options=FP32, fullgraph=True)
    compiled(torch.randn(2, 13))
    for site in adapter_sites(model).values():
        nn.init.normal_(site.b(), std=0.3)
    for tokens in (2, 5, 6):
        x = torch.randn(tokens, 13)
        numbers = []
        for call in (compiled, model):
            model.zero_grad()
            y = call(x)
            y.square().sum().backward()
            numbers.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(numbers[0]) == 5
        for ours, eager in zip(*numbers, strict=True):
            # fp32 sums of at most 26 terms in another order: 26 * 2^-24 of the largest, a few layers deep
            torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5 * float(eager.abs().max()))


def test_new_sizes_compile_once_to_dynamic_shapes_and_a_size_of_one_once_more():
    model = Two()
    compiled = torch.compile(model, backend="qlora", options=FP32 | {"lowering": "eager"}, fullgraph=True)
    counts = []
    for shape in ((2, 5), (3, 9), (5, 4), (1, 7)):
        compiled(torch.randn(*shape, 13))
        counts.append(len(prepared_state(model).reports))  # type: ignore[union-attr]
    assert counts == [1, 2, 2, 3]
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((4, 8), (1, 12), (6, 3)):
            compiled(torch.randn(*shape, 13))


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_the_dense_weights_are_gone_after_the_first_call(lowering: str):
    model = Two()
    dense = [weakref.ref(model.up.weight), weakref.ref(model.down.weight)]
    kept = weakref.ref(model.up.bias)
    compiled = torch.compile(model, backend="qlora", options=FP32 | {"lowering": lowering}, fullgraph=True)
    compiled(torch.randn(3, 13)).sum().backward()
    gc.collect()
    assert [ref() for ref in dense] == [None, None]
    assert kept() is model.up.bias


def test_dropout_is_traced_again_when_the_mode_changes():
    """`guard_training`: a graph traced before its module drops anything reads no `training`."""
    model = Two()
    compiled = torch.compile(model, backend="qlora", options=FP32 | {"lora_dropout": 0.5}, fullgraph=True)
    x = torch.randn(3, 13)
    compiled(x)
    for site in adapter_sites(model).values():
        nn.init.normal_(site.b())
    assert not torch.equal(compiled(x), compiled(x))  # two masks
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)  # fp32 products in another order
    model.train()
    assert not torch.equal(compiled(x), compiled(x))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_backend_that_swaps_a_class_may_have_the_frame_traced_again(breaks):
    """One call, two traces, one compile, and the guards hold afterwards. Where the old code broke the graph, its own frame
    is already running: that one call ends in the old code, the next ones are in the new."""

    class Old(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if breaks and x.sum() > 1e9:  # depends on data: a graph break
                return x
            return super().forward(x)

    class New(Old):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    model = nn.Sequential(Old(3, 4), nn.Linear(4, 2))
    classes: list[type] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if type(model[0]) is Old:
            model[0].__class__ = New
            raise dynamo.traced_again("the class changed")
        classes.append(type(model[0]))
        return gm.forward

    x = torch.randn(5, 3)
    compiled = torch.compile(model, backend=backend)
    first = compiled(x)
    expected = model[1](F.linear(x, model[0].weight * 2, model[0].bias))
    if not breaks:
        torch.testing.assert_close(first, expected)
        assert classes == [New]
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert set(classes) == {New}


def test_a_trace_on_the_meta_device_takes_a_tensor_made_of_a_number():
    """`torch.tensor(0.5, device=x.device)` is no fake tensor there, and the fake ops refuse it (Falcon, GPT-Neo)."""

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.tensor(0.5, dtype=x.dtype, device=x.device))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.empty(3, 5, device="meta")
    with pytest.raises(RuntimeError, match="convert all Tensors to FakeTensors"), dynamo.quiet_fakes():
        compiled(x)
    torch._dynamo.reset()
    with dynamo.real_scalars():
        assert compiled(x).shape == (3, 5)
