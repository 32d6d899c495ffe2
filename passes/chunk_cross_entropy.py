"""Output head and loss -> one op that never holds the gradient of all logits, and with `keep_logits=False` not them either.

    z = linear(h, W, b);  cross_entropy(f(z).float().view(-1, V), t.view(-1), reduction="mean")
        ->  linear_cross_entropy(h, W, b, t, ignore_index, ...) / (t != ignore_index).sum()

f is a scaling by a number (Granite, Cohere) and a soft cap `c * tanh(z / c)` (Gemma 2). A slice of the tokens moves from
the logits to h. Where the graph returns the logits, it returns None. What is not recognised stays, with the reason.

With `keep_logits` (the default), where a frozen head's own result is what the graph returns and the loss reads:

        ->  linear_cross_entropy_logits(h, W, b, t, ignore_index): the loss, and z for the graph to return

Autograd sees the loss alone. The graph returns h too, and the callable around the compiled graph makes z a function of it
(`with_gradient`), so that who differentiates z gets the same gradient, and nobody else pays for it.
"""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import linear_cross_entropy as _op  # noqa: F401  defines the op
from ..fx_utils import MUL, dtype_of, emit, is_call, is_linear, rank_of, replace, under_cast, value, writes_between
from ..pass_manager import PassContext

_DEFAULTS = {
    "weight": None, "size_average": None, "ignore_index": -100, "reduce": None, "reduction": "mean", "label_smoothing": 0.0,
}  # fmt: skip
_DIV = (operator.truediv, operator.itruediv, torch.div, "div")
_TANH = (torch.tanh, "tanh", F.tanh)
_RESHAPES = ("view", "reshape", "flatten", torch.reshape, torch.flatten)
_SWAPS = ("transpose", "permute", "swapaxes", torch.transpose, torch.permute, "movedim", torch.movedim)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _DeclinedError(Exception):
    """Why a loss stays as it is."""


@dataclass
class _Chain:
    """What lies between the head and the loss."""

    head: fx.Node
    nodes: list[fx.Node]  # head first, each the input of the next; the loss reads the last
    slices: list[fx.Node]
    scale: float = 1.0
    soft_cap: float = 0.0


def chunk_cross_entropy(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of losses rewritten."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_call(node, F.cross_entropy):
            continue
        try:
            if ctx.config.keep_logits:
                _keep(node, ctx)
            else:
                _drop(node)
        except _DeclinedError as reason:
            if not ctx.config.keep_logits:
                ctx.decline(node.name, str(reason))
                warnings.warn(f"keep_logits=False has no effect on {node.name}: {reason}.", UserWarning, stacklevel=2)
        else:
            count += 1
    return count


def _drop(loss: fx.Node) -> None:
    """No logits."""
    given, chain = _recognised(loss)
    x, weight, bias = chain.head.args
    for node in chain.slices:
        x = _slice_of(x, node, loss)
    args = (x, weight, bias, given["target"], given["ignore_index"], chain.scale, chain.soft_cap)
    new = emit(loss, torch.ops.qlora.linear_cross_entropy.default, args, loss)
    _replace_loss(loss, new, given)
    _drop_from_outputs(chain)


def _keep(loss: fx.Node, ctx: PassContext) -> None:
    """The logits, which the graph returns, without the gradient of them that nobody asks for."""
    given, chain = _recognised(loss)
    output = chain.head.graph.output_node()
    if chain.slices or chain.scale != 1 or chain.soft_cap or ctx.kept_logits:
        raise _DeclinedError("the logits are changed before the loss reads them")
    if [node for node in chain.nodes if output in node.users] != [chain.head]:
        raise _DeclinedError("the graph does not return the head's own result")
    x, weight, bias = chain.head.args
    owner, example = ctx.param(weight), value(x)
    if owner is None or ctx.edits.trains(owner) or bias is not None:
        raise _DeclinedError("the head trains")
    if not isinstance(example, torch.Tensor) or not example.requires_grad:
        raise _DeclinedError("nothing is differentiated")
    args = (x, weight, None, given["target"], given["ignore_index"])
    both = emit(loss, torch.ops.qlora.linear_cross_entropy_logits.default, args, loss)
    new = emit(loss, operator.getitem, (both, 0), loss)
    logits = emit(loss, operator.getitem, (both, 1), chain.head)
    both.meta["example_value"] = [_scalar(loss, torch.float32), value(chain.head)]
    logits.meta["example_value"] = value(chain.head)
    _replace_loss(loss, new, given)
    (returned,) = output.args
    ctx.kept_logits = tuple((i, weight.name) for i, node in enumerate(returned) if node is chain.head)
    output.args = ((*(logits if node is chain.head else node for node in returned), x),)


def _recognised(loss: fx.Node) -> tuple[dict[str, Any], _Chain]:
    """The loss's arguments by name, and how its logits come from a head. Raises _DeclinedError."""
    given = _DEFAULTS | dict(zip(("input", "target", *_DEFAULTS), loss.args)) | dict(loss.kwargs)
    _check_options(given)
    chain = _chain(given["input"])
    _check_users(chain, loss)
    return given, chain


def _replace_loss(loss: fx.Node, new: fx.Node, given: dict[str, Any]) -> None:
    """The sum of the losses in fp32 -> what the graph's loss is, in the loss's place."""
    new.meta["example_value"] = _scalar(loss, torch.float32)
    if given["reduction"] == "mean":
        counted = emit(loss, operator.ne, (given["target"], given["ignore_index"]), loss)
        rows = emit(loss, "sum", (counted,), loss, method=True)
        new = emit(loss, operator.truediv, (new, rows), loss)
    if dtype_of(loss) != torch.float32:
        new.meta["example_value"] = _scalar(loss, torch.float32)
        new = emit(loss, "to", (new, dtype_of(loss)), loss, method=True)
    replace(loss, new)


def _scalar(like: fx.Node, dtype: torch.dtype) -> Any:
    example = value(like)
    return example.to(dtype) if isinstance(example, torch.Tensor) else None


def _check_options(given: dict[str, Any]) -> None:
    if given["weight"] is not None:
        raise _DeclinedError("cross_entropy weighs the classes")
    if given["label_smoothing"]:
        raise _DeclinedError("cross_entropy smooths the labels")
    if given["reduction"] not in ("mean", "sum") or given["reduce"] is not None or given["size_average"] is not None:
        raise _DeclinedError(f"cross_entropy reduces by {given['reduction']!r}, not by mean or sum")
    if dtype_of(given["target"]) != torch.int64:
        raise _DeclinedError("the targets are probabilities, not classes")


def _chain(node: Any) -> _Chain:
    """Walk from the loss's input up to the head. The steps are met in reverse: a cap only above (before) a scale."""
    classes_last = _is_classes_last(node)
    nodes, slices, scale, soft_cap = [], [], 1.0, 0.0
    while not is_linear(node):
        nodes.append(node)
        inner = under_cast(node)
        if inner is not None:
            node = inner
        elif is_call(node, "contiguous"):
            node = node.args[0]
        elif not classes_last:
            node, classes_last = _before_swap(node), True
        elif is_call(node, *_RESHAPES):
            node = _before_reshape(node)
        elif is_call(node, operator.getitem) and isinstance(node.args[1], (tuple, slice)):
            slices.append(_checked_slice(node))
            node = node.args[0]
        elif (capped := _soft_cap(node)) is not None and soft_cap == 0 and scale == 1:
            (node, soft_cap), parts = capped[:2], capped[2]
            nodes += parts
        elif (factor := _factor(node)) is not None:
            node, scale = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[1], scale * factor
        else:
            raise _DeclinedError(_why_no_head(node))
    if not classes_last:
        raise _DeclinedError("the tokens are not rows of the head's input")
    if (
        dtype_of(node) != dtype_of(node.args[0])
        or dtype_of(node) not in _FLOATS
        or dtype_of(node.args[1]) != dtype_of(node)
    ):
        raise _DeclinedError(f"the head computes in {dtype_of(node)} from {dtype_of(node.args[0])} (autocast)")
    return _Chain(node, [node, *reversed(nodes)], slices[::-1], scale, soft_cap)


def _is_classes_last(node: Any) -> bool:
    """cross_entropy reads [N, V] and, with more dimensions, [N, V, ...]."""
    rank = rank_of(node)
    if rank is None or rank < 2:
        raise _DeclinedError("cross_entropy reads one row without a batch")
    return rank == 2


def _before_reshape(node: fx.Node) -> Any:
    """logits [..., V] for a reshape of the other dimensions only."""
    before, after = value(node.args[0]), value(node)
    if before.shape[-1] != after.shape[-1]:
        raise _DeclinedError(f"{node.name} reshapes the logits other than to one row a token")
    return node.args[0]


def _before_swap(node: Any) -> Any:
    """logits [N, ..., V] for a transpose to [N, V, ...] that keeps the order of the tokens."""
    if is_call(node, *_SWAPS):
        probe = torch.empty((2, 3, 5, 7, 11)[: rank_of(node)], device="meta")
        swap = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target
        if swap(probe, *node.args[1:], **node.kwargs).shape == probe.movedim(-1, 1).shape:
            return node.args[0]
    raise _DeclinedError(
        "the classes are not the last dimension of the logits, nor moved from there just before the loss"
    )


def _checked_slice(node: fx.Node) -> fx.Node:
    """A slice of the tokens: `[..., :-1, :]`, `[:, 1:]`, with all dimensions kept and the last one whole."""
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    rank = rank_of(node.args[0]) or 0
    plain = all(item is Ellipsis or isinstance(item, slice) for item in items) and rank_of(node) == rank
    last_named = items[-1] != slice(None) and items[-1] is not Ellipsis and (len(items) == rank or Ellipsis in items)
    if not plain or last_named:
        raise _DeclinedError(f"{node.name} picks single logits")
    return node


def _soft_cap(node: fx.Node) -> tuple[Any, float, list[fx.Node]] | None:
    """(z, c, the inner nodes) for `tanh(z / c) * c`."""
    cap = _number(node) if is_call(node, *MUL) else None
    tanh: Any = next((a for a in node.args if isinstance(a, fx.Node)), None)
    inner = tanh.args[0] if is_call(tanh, *_TANH) else None
    if cap is None or inner is None:
        return None
    if not is_call(inner, *_DIV) or _number(inner) != cap or not isinstance(inner.args[0], fx.Node):
        return None
    return inner.args[0], cap, [tanh, inner]


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


def _check_users(chain: _Chain, loss: fx.Node) -> None:
    """The logits go to the loss and to the graph's output, nowhere else: there will be none."""
    for node in chain.nodes:
        for user in node.users:
            if user not in (*chain.nodes, loss) and user.op != "output":
                raise _DeclinedError(f"{user.name} reads the logits too")
    if writes_between(chain.head, loss, None):
        raise _DeclinedError("something between the output head and the loss writes in place")


def _slice_of(x: Any, node: fx.Node, before: fx.Node) -> fx.Node:
    """The tokens that the logits' slice keeps, taken from the head's input: the last dimension is whole in both."""
    sliced = emit(before, operator.getitem, (x, node.args[1]), node)
    example = value(x)
    items = fx.map_arg(node.args[1], value)  # a bound may be a symbolic size
    sliced.meta["example_value"] = example[items] if isinstance(example, torch.Tensor) else None
    return sliced


def _drop_from_outputs(chain: _Chain) -> None:
    """The graph's output has None where it had logits: Dynamo builds the model's output from these slots."""
    output = next(node for node in reversed(chain.head.graph.nodes) if node.op == "output")
    output.args = fx.map_arg(output.args, lambda node: None if node in chain.nodes else node)
