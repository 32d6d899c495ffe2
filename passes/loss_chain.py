"""What stands between an output head and a cross-entropy, recognised: `loss_chain(loss)` gives it or says why not.

    z = linear(h, W, b);  cross_entropy(f(z).float().view(-1, V), t.view(-1), reduction="mean")

f is a scaling by a number (Granite, Cohere) and a soft cap `c * tanh(z / c)` (Gemma 2); casts, reshapes of the tokens,
slices of them and classes moved to where cross_entropy wants them may stand anywhere between.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..fx_utils import MUL, dtype_of, is_call, is_linear, rank_of, under_cast, value, writes_between

_DEFAULTS = {
    "weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean", "label_smoothing": 0.0,
}  # fmt: skip
_DIV = (operator.truediv, operator.itruediv, torch.div, "div")
_TANH = (torch.tanh, "tanh", F.tanh)
_RESHAPES = ("view", "reshape", "flatten", torch.reshape, torch.flatten)
_SWAPS = ("transpose", "permute", "swapaxes", torch.transpose, torch.permute, "movedim", torch.movedim)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class DeclinedError(Exception):
    """Why a loss stays as it is."""


@dataclass
class LossChain:
    """What lies between the head and the loss; each node is the input of the next one in its list."""

    nodes: list[fx.Node] = field(default_factory=list)  # the head first; the loss reads the last
    slices: list[fx.Node] = field(default_factory=list)  # those that take some of the tokens
    changes: list[fx.Node] = field(default_factory=list)  # those that are f
    reshapes: list[fx.Node] = field(default_factory=list)  # those that give the tokens other dimensions
    scale: float = 1.0
    soft_cap: float = 0.0

    @property
    def head(self) -> fx.Node:
        """The linear."""
        return self.nodes[0]


def loss_chain(loss: fx.Node) -> tuple[dict[str, Any], LossChain]:
    """The loss's arguments by name, and how its logits come from a head. Raises DeclinedError."""
    given = _DEFAULTS | dict(zip(("input", "target", *_DEFAULTS), loss.args)) | dict(loss.kwargs)
    _check_options(given)
    chain = _chain(given["input"])
    _check_users(chain, loss)
    return given, chain


def _check_options(given: dict[str, Any]) -> None:
    if given["weight"] is not None:
        raise DeclinedError("cross_entropy weighs the classes")
    if given["label_smoothing"]:
        raise DeclinedError("cross_entropy smooths the labels")
    if given["reduction"] not in ("mean", "sum") or given["reduce"] is not None or given["size_average"] is not None:
        raise DeclinedError(f"cross_entropy reduces by {given['reduction']!r}, not by mean or sum")
    if dtype_of(given["target"]) != torch.int64:
        raise DeclinedError("the targets are probabilities, not classes")


def _chain(node: Any) -> LossChain:
    """Walk from the loss's input up to the head. The steps are met in reverse: a cap only above (before) a scale."""
    classes_last = _is_classes_last(node)
    chain = LossChain()
    while not is_linear(node):
        chain.nodes.insert(0, node)
        inner = under_cast(node)
        if inner is not None:
            node = inner
        elif is_call(node, "contiguous"):
            node = node.args[0]
        elif not classes_last:
            chain.reshapes.append(node)
            node, classes_last = _before_swap(node), True
        elif is_call(node, *_RESHAPES):
            chain.reshapes.append(node)
            node = _before_reshape(node)
        elif is_call(node, operator.getitem) and isinstance(node.args[1], (tuple, slice)):
            chain.slices.insert(0, _checked_slice(node))
            node = node.args[0]
        elif chain.soft_cap == 0 and chain.scale == 1 and (capped := _soft_cap(node)) is not None:
            parts = capped[2]
            chain.nodes[:0] = parts
            chain.changes += [*parts, node]
            node, chain.soft_cap = capped[:2]
        elif (factor := _factor(node)) is not None:
            chain.changes.append(node)
            node, chain.scale = (
                node.args[0] if isinstance(node.args[0], fx.Node) else node.args[1],
                chain.scale * factor,
            )
        else:
            raise DeclinedError(_why_no_head(node))
    if not classes_last:
        raise DeclinedError("the tokens are not rows of the head's input")
    x, weight = node.args[:2]
    if dtype_of(node) not in _FLOATS or {dtype_of(x), dtype_of(weight)} != {dtype_of(node)}:
        raise DeclinedError(f"the head computes in {dtype_of(node)} from {dtype_of(x)} (autocast)")
    chain.nodes.insert(0, node)
    return chain


def _is_classes_last(node: Any) -> bool:
    """cross_entropy reads [N, V] and, with more dimensions, [N, V, ...]."""
    rank = rank_of(node)
    if rank is None or rank < 2:
        raise DeclinedError("cross_entropy reads one row without a batch")
    return rank == 2


def _before_reshape(node: fx.Node) -> Any:
    """logits [..., V] for a reshape of the other dimensions only."""
    before, after = value(node.args[0]), value(node)
    if before.shape[-1] != after.shape[-1]:
        raise DeclinedError(f"{node.name} reshapes the logits other than to one row a token")
    return node.args[0]


def _before_swap(node: Any) -> Any:
    """logits [N, ..., V] for a transpose to [N, V, ...] that keeps the order of the tokens."""
    if is_call(node, *_SWAPS):
        probe = torch.empty((2, 3, 5, 7, 11)[: rank_of(node)], device="meta")
        swap = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        if swap(probe, *node.args[1:], **node.kwargs).shape == probe.movedim(-1, 1).shape:
            return node.args[0]
    raise DeclinedError(
        "the classes are not the last dimension of the logits, nor moved from there just before the loss"
    )


def _checked_slice(node: fx.Node) -> fx.Node:
    """A slice of the tokens: `[..., :-1, :]`, `[:, 1:]`, with all dimensions kept and the last one whole."""
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    rank = rank_of(node.args[0]) or 0
    plain = all(item is Ellipsis or isinstance(item, slice) for item in items) and rank_of(node) == rank
    last_named = items[-1] != slice(None) and items[-1] is not Ellipsis and (len(items) == rank or Ellipsis in items)
    if not plain or last_named:
        raise DeclinedError(f"{node.name} picks single logits")
    return node


def _soft_cap(node: fx.Node) -> tuple[Any, float, list[fx.Node]] | None:
    """(z, c, the division and the tanh) for `tanh(z / c) * c`."""
    cap = _number(node) if is_call(node, *MUL) else None
    tanh: Any = next((a for a in node.args if isinstance(a, fx.Node)), None)
    inner = tanh.args[0] if is_call(tanh, *_TANH) else None
    if cap is None or inner is None:
        return None
    if not is_call(inner, *_DIV) or _number(inner) != cap or not isinstance(inner.args[0], fx.Node):
        return None
    return inner.args[0], cap, [inner, tanh]


def _factor(node: fx.Node) -> float | None:
    """s for `z * s`, 1 / s for `z / s`."""
    number = _number(node)
    if number is None or not math.isfinite(number) or number == 0:
        return None
    if is_call(node, *MUL):
        return number
    return 1 / number if is_call(node, *_DIV) and isinstance(node.args[0], fx.Node) else None


def _number(node: Any) -> float | None:
    if not isinstance(node, fx.Node) or len(node.args) != 2 or node.kwargs:
        return None
    numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    return float(numbers[0]) if len(numbers) == 1 else None


def _why_no_head(node: Any) -> str:
    if is_call(node, operator.getitem) and is_call(node.args[0], torch.ops.qlora.lora_linear.default):
        return "the output head is quantized or has adapters: leave it out by exclude_modules"
    if isinstance(node, fx.Node) and node.op == "placeholder":
        return "the logits come from another graph"
    return f"{getattr(node, 'name', node)} stands between the output head and the loss"


def _check_users(chain: LossChain, loss: fx.Node) -> None:
    """The logits go to the loss and to the graph's output, nowhere else: there will be none."""
    for node in chain.nodes:
        for user in node.users:
            if user not in (*chain.nodes, loss) and user.op != "output":
                raise DeclinedError(f"{user.name} reads the logits too")
    if writes_between(chain.head, loss, None):
        raise DeclinedError("something between the output head and the loss writes in place")
