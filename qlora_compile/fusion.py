"""Which values of an ATen graph Inductor never writes to memory: what it computes again inside each kernel that reads them.

logits (product) -> fp32 -> minus the row's maximum -> exp -> sum       only the logits and numbers a row are written
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# besides what torch itself tags as pointwise: copies, gathers and constants, which Inductor reads element by element
_BY_ELEMENT = {
    "_to_copy", "_unsafe_index", "arange", "cat", "constant_pad_nd", "convert_element_type", "copy", "embedding",
    "flip", "full", "full_like", "gather", "index", "iota", "lift_fresh_copy", "new_full", "new_zeros", "ones",
    "ones_like", "repeat", "roll", "scalar_tensor", "select_scatter", "slice_scatter", "zeros", "zeros_like",
}  # fmt: skip
_MOST_READS = 4  # torch._inductor.config.realize_reads_threshold: a value of more inputs is written once, not repeated


def never_written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values exist inside kernels only.

    A value computed element by element is written if something reads it that is no such kernel (a product, an op of ours),
    if the graph returns it, or if a later kernel reads it and it depends on too much to be computed there again. Reductions
    are always written: they are small.
    """
    stage = _stages(graph)
    found: set[fx.Node] = set()
    reads: dict[fx.Node, set[fx.Node]] = {}  # what a node reads once its unwritten inputs are computed in place
    for node in graph.nodes:
        reads[node] = {node}
        if not _is_view(node) and not is_by_element(node):
            continue
        sources = set().union(*(reads[source] for source in node.all_input_nodes))
        if _is_view(node):
            reads[node] = sources
            continue
        users = _users(node)
        later = any(stage[user] > stage[node] for user in users)
        if all(map(_is_generated, users)) and not (later and len(sources) > _MOST_READS):
            found.add(node)
            reads[node] = sources
    return found


def _stages(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many calls of library or own kernels stand between the inputs and a node: what Inductor cannot fuse across."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((found[source] for source in node.all_input_nodes), default=0)
        found[node] = before + (node.op == "call_function" and not _is_generated(node) and not _is_view(node))
    return found


def _users(node: fx.Node) -> list[fx.Node]:
    """What reads the node's value, through views of it."""
    found, stack = list[fx.Node](), list(node.users)
    while stack:
        user = stack.pop()
        if _is_view(user):
            stack += user.users
        else:
            found.append(user)
    return found


def _name(node: fx.Node) -> str:
    return node.target._opname if isinstance(node.target, torch._ops.OpOverload) else ""


def _tags(node: fx.Node) -> list[Any]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem or _name(node) == "_unsafe_view":
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def is_by_element(node: fx.Node) -> bool:
    if torch.Tag.pointwise in _tags(node) or _name(node) in _BY_ELEMENT:
        return True
    # one value put into a constant: a comparison of indices
    constant = node.args[0] if _name(node) == "scatter" else None
    return isinstance(constant, fx.Node) and _name(constant) == "full" and not isinstance(node.args[3], fx.Node)


def _is_generated(node: fx.Node) -> bool:
    """Whether the node becomes part of a kernel that Inductor generates."""
    return is_by_element(node) or torch.Tag.reduction in _tags(node)
