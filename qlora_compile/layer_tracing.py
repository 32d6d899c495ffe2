"""How Dynamo traces `equal_layer(layer, x, ...)`: one layer as a subgraph, the others by moving its sources.

    layers.0(x, ...)  ->  invoke_subgraph(body, x, layers.0.q_proj.weight, ...)    traced
    layers.1(x, ...)  ->  invoke_subgraph(body, x, layers.1.q_proj.weight, ...)    moved: guards checked and installed

Dynamo's own reuse for `nested_compile_region` (torch 2.13) is the model. Three things differ. Every guard that layer 0 has
is installed for the others too: theirs checks them while it traces, and a change of layer 7 would later go unseen.
Whatever it refuses (a graph break inside, a result that is no tensor, a write) is traced in line as if nothing had been
marked, where theirs raises. And the pass `inline_checkpoints` puts the bodies in line, so that all other passes see the
flat graph that they always saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from .dynamo import traced_again
from .equal_layers import ORIGINAL, equal_layer

try:
    from torch._dynamo.exc import ObservedException, Unsupported
    from torch._dynamo.guards import GUARD_VALUE_DISPATCH, GuardCheckSpec, install_guard
    from torch._dynamo.source import LocalSource
    from torch._dynamo.variables import higher_order_ops as hops
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.constant import ConstantVariable
    from torch._dynamo.variables.lists import TupleVariable
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
    from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
    from torch._guards import Guard, Source

    from .trace_sources import UNREADABLE, Moves, changed_sources, with_bases

    _FOUND = True
except ImportError:  # an older torch
    _FOUND = False

# Much of what follows is no interface that torch promises: with any other version layers are traced one by one.
TRIED = ("2.13.", "2.14.")
KNOWN = _FOUND and torch.__version__.startswith(TRIED)

_MOST = 4  # kinds of layer of one class that are kept: sliding and full attention are two
STACK = "qlora_layer_stack"  # in a body's meta: the nn_module_stack of the call that it was traced for
BACKENDS: list[Callable[..., Any]] = []  # those that put the bodies in line
_refused: set[type] = set()  # classes of layers that cannot be traced as a subgraph


def register() -> bool:
    """Tell Dynamo how to trace the op; False where this torch cannot."""
    if KNOWN:
        hops._hop_name_to_variable_class[equal_layer.__name__] = _variable_class()
    return KNOWN


@functools.cache
def _variable_class() -> Any:
    class EqualLayerVariable(hops.WrapHigherOrderVariable):  # type: ignore[misc]
        """`equal_layer` while Dynamo traces."""

        _HOP_NAME = equal_layer.__name__
        _ALLOW_FALLBACK_TO_EAGER = True
        supports_input_mutation = False
        supports_aliasing = False
        allow_side_effects = False

        def _call_function(self, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            layer = args[0].realize() if hasattr(args[0], "realize") else args[0]
            forward = _attribute(tx, layer, ORIGINAL)
            call = _Call.of(tx, layer, args[1:], kwargs)
            if call is None:
                return forward.call_function(tx, list(args[1:]), kwargs)
            regions = _REGIONS.setdefault(tx.output.root_tracer, {}).setdefault(call.kind, [])
            for region in regions:
                moves = region.move(tx, call)
                if moves is not None:
                    return region.call(tx, call, moves)
            if len(regions) == _MOST:
                return forward.call_function(tx, list(args[1:]), kwargs)
            try:
                traced = self.create_wrapped_node(tx, forward, list(args[1:]), kwargs, self._HOP_NAME)
            except (Unsupported, ObservedException, AssertionError) as error:  # the last: of torch, about subgraphs
                raise _refuse(call.kind, str(error)) from error
            region, result = _Region.of(tx, call, traced)
            regions.append(region)
            return result

    return EqualLayerVariable


_REGIONS: WeakKeyDictionary[Any, dict[type, list[_Region]]] = WeakKeyDictionary()  # by the trace


def _refuse(kind: type, reason: str) -> Exception:
    """To be raised: this trace begins again, and layers of this class are traced in line from now on."""
    _refused.add(kind)
    return traced_again(f"layers of {kind.__name__} cannot be traced as one: {reason}")


@dataclass
class _Call:
    """One call of a layer: what a trace of it depends on, and the sources that differ from layer to layer."""

    kind: type
    facts: tuple[Any, ...]
    sources: list[Source | None]
    proxies: list[Any]  # of the tensors and symbolic numbers among the arguments, each once

    @staticmethod
    def of(tx: Any, layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call | None:
        """None where the call is to be traced in line."""
        known = isinstance(layer, UnspecializedNNModuleVariable) and layer.source is not None
        if not known or type(layer.value) in _refused or not _is_ours(tx.output.compiler_fn):
            return None
        if tx.output.export or tx.output.current_tracer.parent is not None:
            return None
        if tx.symbolic_torch_function_state.in_torch_function_mode() or torch._C._functorch.peek_interpreter_stack():
            return None
        inside = [(name, module) for name, module in layer.value.named_modules() if name]
        if any(_is_special(module) for _, module in inside):
            return None
        call = _Call(type(layer.value), (), [layer.source], [])
        facts = [call._fact(argument) for argument in (*args, *kwargs.values())]
        if any(fact is None for fact in facts):
            return None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
        autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
        classes = tuple((name, type(module)) for name, module in inside)
        call.facts = (classes, len(args), tuple(kwargs), modes, tuple(autocast), tuple(facts))
        return call

    def _fact(self, given: Any) -> Any:
        """What the trace can see of an argument; None for one of another kind."""
        given = given.realize() if hasattr(given, "realize") else given
        if type(given) is TupleVariable:
            inner = [self._fact(item) for item in given.items]
            return None if any(fact is None for fact in inner) else ("tuple", *inner)
        if not isinstance(given, (TensorVariable, SymNodeVariable, ConstantVariable)):
            return None
        self.sources.append(given.source)
        if isinstance(given, ConstantVariable):
            return ("constant", given.source is None, type(given.value), given.value)
        proxy = given.as_proxy()
        which = next((i for i, known in enumerate(self.proxies) if known.node is proxy.node), len(self.proxies))
        if which == len(self.proxies):
            self.proxies.append(proxy)
        if isinstance(given, SymNodeVariable):
            return ("number", given.source is None, which, str(given.sym_num))
        example = proxy.node.meta["example_value"]
        return ("tensor", given.source is None, which, type(given), *_layout(example), example.requires_grad)


def _attribute(tx: Any, variable: Any, name: str) -> Any:
    """`getattr` while Dynamo traces; torch 2.14 has another name for it."""
    if hasattr(variable, "var_getattr"):
        return variable.var_getattr(tx, name)
    return variable.tp_getattro_impl(tx, name)


def _is_special(module: nn.Module) -> bool:
    """Whether it runs code of its own: Dynamo leaves no guard on hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in module.__dict__ or any(module.__dict__.get(name) for name in hooks)


def _layout(example: torch.Tensor) -> tuple[Any, ...]:
    return type(example), str(tuple(example.shape)), str(example.stride()), example.dtype, example.device


def _is_ours(compiler: Any) -> bool:
    """Whether the backend under Dynamo's and torch.compile's wrappers puts the bodies in line again."""
    while compiler is not None and compiler not in BACKENDS:
        wrapped = (getattr(compiler, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn", "func"))
        compiler = next((inner for inner in wrapped if inner is not None), None)
    return compiler is not None


@dataclass
class _Region:
    """A traced layer."""

    call_facts: tuple[Any, ...]
    sources: list[Source | None]
    body: str
    operands: list[int | Source]  # which of the call's tensors, or where the tensor is found
    results: list[tuple[Any, ...]]
    is_tuple: bool
    guards: list[tuple[Guard, Any, Any]]  # (guard, how its value is compared, the value here)
    reads: set[Source]

    @staticmethod
    def of(tx: Any, call: _Call, traced: Any) -> tuple[_Region, Any]:
        """(the region, the call's result) of what Dynamo traced; raises to begin again where it cannot be moved."""
        operands, _, examples, result, body, name, results, info = traced
        reads = with_bases(info.traced_sources)
        if reads & changed_sources(tx):
            raise _refuse(call.kind, "it reads what the model's own code has changed")
        is_tuple = type(result) is TupleVariable
        if not all(isinstance(item, TensorVariable) for item in (result.items if is_tuple else [result])):
            raise _refuse(call.kind, "a result is no tensor")
        if any("unbacked_bindings" in node.meta for node in body.graph.nodes):
            raise _refuse(call.kind, "a size in it depends on data")
        body.meta[STACK] = dict(tx.nn_module_stack)
        nodes = [proxy.node for proxy in call.proxies]
        where = [nodes.index(p.node) if p.node in nodes else _source_of(p.node) for p in operands[1:]]
        if any(place is None for place in where):
            raise _refuse(call.kind, "it uses a tensor from outside, or a number that changes")
        kept = [(tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad) for t in examples]
        guards = _guards_on(tx, call)
        region = _Region(call.facts, call.sources, name, where, kept, is_tuple, guards, reads)  # type: ignore[arg-type]
        invoke = torch.ops.higher_order.invoke_subgraph
        flat = hops.add_call_function(tx, invoke, (operands[0], name, *operands[1:]), {}, examples)
        hops.overwrite_tensor_vt_proxy(results, flat)
        return region, result

    def move(self, tx: Any, call: _Call) -> Moves | None:
        """The way to the called layer, if a trace of it would give the same: same arguments, same values at its guards."""
        if call.facts != self.call_facts:
            return None
        moves, back = Moves(tx, self.sources, call.sources), Moves(tx, call.sources, self.sources)
        changed = changed_sources(tx)
        if self.reads & {*changed, *map(back, changed)}:
            return None
        for guard, spec, expected in self.guards:
            try:
                value = moves.value(moves(guard.originating_source))
                if spec is None:
                    same = value is moves.value(moves(_other_source(guard)))
                else:
                    same = type(value) is expected[0] and spec.eval_fn(value, expected[1])
            except UNREADABLE:
                return None
            if not same:
                return None
        return moves

    def call(self, tx: Any, call: _Call, moves: Moves) -> Any:
        """A call of the body with the called layer's own tensors, and all guards that its trace would have left."""
        for guard, _, _ in self.guards:
            source = moves(guard.originating_source)
            if guard.create_fn_name() == "TENSOR_MATCH":
                VariableBuilder(tx, source)(moves.value(source))  # installs its own
            else:
                create = guard.create_fn
                if guard.create_fn_name() == "DUPLICATE_INPUT":
                    create = functools.partial(create.func, source_b=moves(_other_source(guard)))  # type: ignore[attr-defined]
                install_guard(Guard(source, create, user_stack=guard.user_stack))
        operands = [
            call.proxies[place]
            if isinstance(place, int)
            else VariableBuilder(tx, moves(place))(moves.value(moves(place))).as_proxy()
            for place in self.operands
        ]
        with tx.fake_mode:
            examples = tuple(
                torch.empty_strided(shape, stride, dtype=dtype, device=device, requires_grad=trains)
                for shape, stride, dtype, device, trains in self.results
            )
        invoke, body = torch.ops.higher_order.invoke_subgraph, hops.make_attr(tx, self.body)
        flat = hops.add_call_function(tx, invoke, (body, self.body, *operands), {}, examples)
        return TupleVariable(list(flat.items)) if self.is_tuple else flat.items[0]


def _source_of(node: fx.Node) -> Source | None:
    """Where a graph input comes from; None for what was computed, or is a number."""
    argument = node.meta.get("grapharg")
    # a float that has changed once is a graph input as a tensor, though its source is a number
    if argument is None or argument.pass_arg_as_tensor or isinstance(argument.example, torch.SymInt):
        return None
    return argument.source


def _other_source(guard: Guard) -> Source:
    return guard.create_fn.keywords["source_b"]  # type: ignore[attr-defined,no-any-return]


def _guards_on(tx: Any, call: _Call) -> list[tuple[Guard, Any, Any]]:
    """The guards so far on anything that differs from layer to layer."""
    elsewhere = LocalSource("another layer's")
    away, stay = Moves(tx, call.sources, [elsewhere] * len(call.sources)), Moves(tx, [], [])
    found: list[tuple[Guard, Any, Any]] = []
    for guard in tx.output.guards:
        source, name = guard.originating_source, guard.create_fn_name()
        is_pair = name == "DUPLICATE_INPUT"
        if all(away(part) == part for part in ([source, _other_source(guard)] if is_pair else [source])):
            continue
        spec = GUARD_VALUE_DISPATCH.get(name)
        if is_pair:
            found.append((guard, None, None))
        elif isinstance(spec, GuardCheckSpec):
            try:
                value = stay.value(source)
            except UNREADABLE as error:
                raise _refuse(call.kind, f"{source.name} cannot be read") from error
            found.append((guard, spec, (type(value), spec.get_metadata_fn(guard, value))))
        else:
            raise _refuse(call.kind, f"it has a guard {name}")
    return found


__all__ = ["BACKENDS", "KNOWN", "STACK", "register"]
