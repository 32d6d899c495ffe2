"""The adapter branch as a pattern: how it is written into a graph and how it is found again.

    h = linear(dropout(x), A);   y + linear(h, B) * alpha * weight          (ours; PEFT's has no weight)

`alpha` is the product of the Python numbers, `weight` that of the 0-dim tensors; casts may stand anywhere. A number that
Dynamo saw change (another model's alpha, PEFT's scaling) is an input of the graph, here a factor.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from ..fx_utils import ADD, LINEAR, MUL, dtype_of, emit, is_call, is_linear, peel_casts, rank_of, value


class Scales(NamedTuple):
    """What a term is multiplied by: the product of the numbers, 0-dim tensors, and numbers that are inputs (SymFloat)."""

    alpha: float
    weights: list[fx.Node]
    factors: list[fx.Node]


@dataclass
class Branch:
    """One adapter's term: A and B placeholders, what scales it, its dropout probability."""

    a: fx.Node
    b: fx.Node
    scales: Scales
    dropout: float = 0.0


def write_branch(
    y: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, scales: Sequence[Any], dropout: float, dtype: torch.dtype
) -> fx.Node:
    """y -> y + linear(linear(dropout(x), A), B) * alpha * weight, as QLoRALinear's forward writes it.

    `scales`: alpha and weight; numbers and 0-dim nodes, in this order.
    """
    before = y.next
    source = emit(before, F.dropout, (x, dropout, True), y) if dropout else x
    h = emit(before, LINEAR, (source, cast(before, a, dtype, y), None), y)
    up = emit(before, LINEAR, (h, cast(before, b, dtype, y), None), y)
    scaled = functools.reduce(lambda term, scale: emit(before, operator.mul, (term, scale), y), scales, up)
    total = emit(before, operator.add, (y, scaled), y)
    y.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    total.meta["example_value"] = y.meta.get("example_value")
    return total


def cast(before: fx.Node, node: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    """node.to(dtype), or the node itself where it has that dtype already."""
    if dtype_of(node) == dtype:
        return node
    out = emit(before, "to", (node, dtype), like, method=True)
    example = node.meta.get("example_value")
    if isinstance(example, torch.Tensor):
        out.meta["example_value"] = torch.empty(example.shape, dtype=dtype, device="meta")
    return out


def find_branches(linear: fx.Node) -> tuple[fx.Node, list[Branch]]:
    """linear(x, W) -> (the last node of the sum, the adapters' branches on the same x that are added to it).

    Casts and clones may stand between the product and the terms: PEFT adds in fp32, or to a clone.
    """
    x = peel_casts(linear.args[0])
    last = y = linear
    branches = list[Branch]()
    while len(y.users) == 1:
        (user,) = y.users
        branch = None
        if is_call(user, *ADD, "add") and not user.kwargs:
            branch = read_branch(user.args[1] if user.args[0] is y else user.args[0], x)
        if branch is not None and value(branch.b).shape[0] == value(linear).shape[-1]:
            branches.append(branch)
            last = user
        elif branch is not None or (not is_call(user, "clone", torch.clone) and peel_casts(user) is user):
            break  # no branch, or one that is broadcast over the outputs
        y = user
    return last, branches


def read_branch(node: Any, x: fx.Node) -> Branch | None:
    """`linear(linear(dropout(x), A), B) * ...` on this very x -> Branch, or None."""
    scaled = read_scales(node, _single)
    if scaled is None:
        return None
    node, scales = scaled
    if not is_linear(node) or node.args[2] is not None:
        return None
    b, h = peel_casts(node.args[1]), _single(peel_casts(node.args[0]))
    if not is_linear(h) or h.args[2] is not None:
        return None
    a, source = peel_casts(h.args[1]), peel_casts(h.args[0])
    dropout = 0.0
    if source is not x and is_call(source, F.dropout):  # x itself may be a dropout's result, which all branches read
        _, probability, training = _dropout_arguments(source)
        dropout = probability if training else 0.0
        source = peel_casts(source.args[0])
    if source is not x or any(not isinstance(n, fx.Node) or n.op != "placeholder" for n in (a, b)):
        return None
    return Branch(a, b, scales, dropout)


def read_scales(node: Any, only: Callable[[Any], Any] = lambda node: node) -> tuple[Any, Scales] | None:
    """`term * 0.5 * weight` -> (term, Scales); None if anything else scales it.

    Casts between the factors are skipped; `only` may refuse a node on the way by returning None for it.
    """
    alpha, weights, factors = 1.0, list[fx.Node](), list[fx.Node]()
    node = only(peel_casts(node))
    while is_call(node, *MUL, "mul") and not node.kwargs:
        left, right = node.args
        if isinstance(right, (int, float)):
            alpha *= right
        elif isinstance(value(right), torch.SymFloat):
            factors.append(right)
        elif isinstance(right, fx.Node) and rank_of(right) == 0:
            weights.append(right)
        else:
            return None
        node = only(peel_casts(left))
    return node, Scales(alpha, weights, factors)


def _dropout_arguments(node: fx.Node) -> tuple[Any, float, bool]:
    names = ("input", "p", "training", "inplace")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    p = given.get("p", 0.5)  # one that Dynamo saw change is an input: it becomes a number, guarded, for the op has one
    return given["input"], float(value(p) if isinstance(p, fx.Node) else p), bool(given.get("training", True))


def _single(node: Any) -> Any:
    """The node if nothing else uses it: otherwise its value is needed anyway and fusing would compute it twice."""
    return node if isinstance(node, fx.Node) and len(node.users) == 1 else None
