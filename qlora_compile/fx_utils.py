"""Helpers over torch-level FX graphs: reading nodes, emitting nodes that keep their provenance, copying Dynamo's graph."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._dynamo.source import SyntheticLocalSource

LINEAR = F.linear
ADD = (operator.add, operator.iadd, torch.add)
MUL = (operator.mul, operator.imul, torch.mul)
RECOMPUTE = ("recompute", "ac_graph_id")  # in node.meta: AOTAutograd computes the node again in backward
_CASTS = ("to", "float", "half", "bfloat16", "type_as")
_WRITING_OPERATORS = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
_TRANSPOSE_METHODS = ("t", "transpose", "permute", "swapaxes", "swapdims")
_TRANSPOSE_FUNCTIONS = (torch.t, torch.transpose, torch.permute)
# `w.T` and `w.mT`, as torch from 2.14 on writes them
_TRANSPOSE_PROPERTIES = (torch.ops.aten.numpy_T, torch.ops.aten.mT)
_ROOT = re.compile(r"L\['(self|fn|args)'\](\[0\])?\.?")  # the compiled module in the frame that Dynamo traced


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be edited: Dynamo goes on using its own graph. Sources are carried over (AOTAutograd checks)."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        # grapharg holds the real parameter: the copy must not keep a dense weight alive
        new.meta = {key: value for key, value in old.meta.items() if key != "grapharg"}
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def add_placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """Append a placeholder after the last one, with a source of its own and its shape and dtype as example value."""
    # placeholders come first: looking no further is what keeps hundreds of these cheap
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        # `0.codes` of an nn.Sequential is no Python name
        node = graph.placeholder(f"state_{re.sub(r'[^0-9A-Za-z_]', '_', name)}")
    node._dynamo_source = SyntheticLocalSource(node.name)  # type: ignore[attr-defined]
    node.meta["example_value"] = torch.empty(example.shape, dtype=example.dtype, device="meta")
    return node


def emit(before: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node, *, method: bool = False) -> fx.Node:
    """A call node before `before` that keeps the meta (module, stack trace) of `like`, but not its value."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_method(target, args) if method else graph.call_function(target, args)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("example_value", "grapharg")}
    return node


def emit_valued(before: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node, *, method: bool = False) -> fx.Node:
    """`emit`, and its value for the example inputs where all of its own have one: what later passes ask for shapes and
    dtypes, and what AOTAutograd must see of a tensor whose method is called, or it caches nothing of the graph."""
    node = emit(before, target, args, like, method=method)
    if all(value(given) is not None for given in node.all_input_nodes):
        values = fx.map_arg(args, value)
        node.meta["example_value"] = getattr(values[0], target)(*values[1:]) if method else target(*values)
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """All uses of `old` -> `new`, which takes over its example value."""
    if "example_value" in old.meta:
        new.meta["example_value"] = old.meta["example_value"]
    old.replace_all_uses_with(new)


def value(node: Any) -> Any:
    """The node's example (fake) value, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def any_value(node: fx.Node) -> Any:
    """The node's example value in a graph of Dynamo's or of AOTAutograd's, which keeps it as "val"; or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def hint(size: Any) -> int:
    """A size as a number: that of the traced input where it is symbolic. No guard is made."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def dtype_of(node: Any) -> torch.dtype | None:
    return getattr(value(node), "dtype", None)


def rank_of(node: Any) -> int | None:
    example = value(node)
    return example.dim() if isinstance(example, torch.Tensor) else None


def is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is LINEAR


def is_call(node: Any, *targets: Any) -> bool:
    """A call_function of one of the functions, or a call_method of one of the names."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def called_graph(node: fx.Node) -> fx.Graph | None:
    """The graph of the region that `node` calls (`invoke_subgraph`), or None."""
    if node.target is not torch.ops.higher_order.invoke_subgraph:
        return None
    return getattr(node.graph.owning_module, str(node.args[0].target)).graph  # type: ignore[union-attr]


def peel_casts(node: Any) -> Any:
    """The node under dtype casts (`x.to(torch.bfloat16)`, `x.float()`): same values, another precision."""
    while (inner := under_cast(node)) is not None:
        node = inner
    return node


def under_cast(node: Any) -> Any:
    """x for `x.to(torch.bfloat16)`, from one floating dtype to another; None where the node is no such cast."""
    return node.args[0] if is_call(node, *_CASTS) and _is_dtype_cast(node) else None


def _is_dtype_cast(node: fx.Node) -> bool:
    dtypes = [dtype_of(node), dtype_of(node.args[0])]
    if any(dtype is not None and not dtype.is_floating_point for dtype in dtypes):
        return False  # x.int() is not the same values
    if node.target != "to":
        return True
    extra = [*node.args[1:], *node.kwargs.values()]
    return len(extra) == 1 and isinstance(extra[0], torch.dtype)


def peel_transposes(node: Any) -> tuple[Any, bool]:
    """(node under 2-D transposes and casts, whether the number of transposes is odd)."""
    odd = False
    while True:
        node = peel_casts(node)
        if not _is_transpose(node):
            return node, odd
        node, odd = node.args[0], not odd


def _is_transpose(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.args or rank_of(node.args[0]) != 2:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if is_call(node, *_TRANSPOSE_PROPERTIES):
        return True
    if not (is_call(node, *_TRANSPOSE_METHODS) or is_call(node, *_TRANSPOSE_FUNCTIONS)):
        return False
    dims = list(node.args[1:]) or list(node.kwargs.values())
    if len(dims) == 1 and isinstance(dims[0], Sequence):
        dims = list(dims[0])
    if node.target in ("permute", torch.permute):
        return [d % 2 for d in dims] == [1, 0]
    return not dims or sorted(d % 2 for d in dims) == [0, 1]


def written(node: fx.Node) -> fx.Node | None:
    """The tensor that this call writes into (`relu_(h)`, `F.relu(h, inplace=True)`, `out=`, `h += 1`, `h[0] = 1`)."""
    if node.op not in ("call_function", "call_method"):
        return None
    if isinstance(node.kwargs.get("out"), fx.Node):
        return node.kwargs["out"]  # type: ignore[return-value]
    name = str(getattr(node.target, "__name__", node.target))
    of_operators = getattr(node.target, "__module__", None) == operator.and_.__module__  # whose `and_` writes nothing
    in_place = (name.endswith("_") and not name.endswith("__") and not of_operators) or name in _WRITING_OPERATORS
    if getattr(node.target, "__module__", None) == "torch.nn.functional" and inspect.isfunction(node.target):
        in_place |= bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    return node.all_input_nodes[0] if in_place and node.all_input_nodes else None


def writes_between(first: fx.Node, last: fx.Node, fresh: Any) -> bool:
    """Whether a call from `first` to `last` may write into what existed before: what no call of `fresh` made since."""
    node, since = first, set[fx.Node]()
    while node is not last:
        since.add(node)
        target = written(node)
        while target is not None and not is_call(target, fresh):
            if target not in since:
                return True
            target = next(iter(target.all_input_nodes), None)  # it may be a view of its input
        node = node.next
    return False


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made this node, relative to the compiled one ("" for its own)."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    return _ROOT.sub("", str(next(reversed(stack.values()))[0]), count=1)


def source_line(node: fx.Node) -> str:
    """The last "File ..., line N, in f" of the node's stack trace, or ""."""
    return _last_file_line(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=8192)  # every snapshot asks for every node's
def _last_file_line(trace: str) -> str:
    lines = (line.strip() for line in reversed(trace.splitlines()))
    return next((line for line in lines if line.startswith("File ")), "")


def recomputed(gm: fx.GraphModule) -> tuple[tuple[str, int], ...]:
    """(name, region) of every node that backward computes again, in the graph and its subgraphs."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    marked = (node for graph in graphs for node in graph.nodes if "recompute" in node.meta)
    return tuple((node.name, node.meta["ac_graph_id"]) for node in marked)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def storages(node: fx.Node) -> dict[Any, int]:
    """The storages that a node's value stands on, with their bytes."""
    found: dict[Any, int] = {}
    stack = [node.meta.get("val")]
    while stack:
        value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack += reversed(value)
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found
