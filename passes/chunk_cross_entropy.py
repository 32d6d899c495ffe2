"""Output head and loss -> one op that never holds the gradient of all logits, and with `keep_logits=False` not them either.

    z = linear(h, W, b);  cross_entropy(f(z).float().view(-1, V), t.view(-1), reduction="mean")
        ->  linear_cross_entropy(h, W, b, t, ignore_index, ...) / (t != ignore_index).sum()

f is a scaling by a number (Granite, Cohere) and a soft cap `c * tanh(z / c)` (Gemma 2). A slice of the tokens moves from
the logits to h. Where the graph returns the logits, it returns None. What is not recognised stays, with the reason.

With `keep_logits` (the default) the same where the head is frozen and the graph returns no logits; and where it returns z
or f(z):

        ->  linear_cross_entropy_logits(h, W, b, t, ignore_index, ...): the loss, and z for the graph to return, or f of it

Autograd sees the loss alone. The graph returns h too, and the callable around the compiled graph makes the logits a
function of it (`with_gradient`), so that who differentiates them gets the same gradient, and nobody else pays for it.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import linear_cross_entropy as _op  # noqa: F401  defines the op
from ..fx_utils import dtype_of, emit, emit_valued, is_call, is_linear, replace, value
from ..pass_manager import KeptLogits, PassContext
from .loss_chain import DeclinedError, LossChain, loss_chain


def chunk_cross_entropy(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of losses rewritten."""
    count = 0
    losses = [node for node in gm.graph.nodes if is_call(node, F.cross_entropy)]
    if not losses and not ctx.config.keep_logits:
        _look_for_logits(gm, ctx)
    for node in losses:
        try:
            given, chain = loss_chain(node)
            if ctx.config.keep_logits:
                _keep(node, given, chain, ctx)
            else:
                _drop(node, given, chain)
        except DeclinedError as reason:
            if not ctx.config.keep_logits:
                _say(node, str(reason), ctx)
        else:
            count += 1
    return count


def _say(node: fx.Node, reason: str, ctx: PassContext) -> None:
    ctx.decline(node.name, reason)
    warnings.warn(f"keep_logits=False has no effect on {node.name}: {reason}.", UserWarning, stacklevel=2)


def _look_for_logits(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Say so where a step that trains returns logits and has no loss: it is computed outside, and needs them."""
    for node in gm.graph.nodes:
        owner = ctx.param(node.args[1]) if is_linear(node) else None
        if owner is not None and ctx.edits.is_output_head(owner) and _is_differentiated(node) and _is_returned(node):
            _say(node, "the loss is not computed in its graph (labels=... has a transformers model compute it)", ctx)


def _is_differentiated(node: fx.Node) -> bool:
    example = value(node)
    return isinstance(example, torch.Tensor) and example.requires_grad


def _is_returned(logits: fx.Node) -> bool:
    """Whether the graph returns the logits, or what is made of them and still has a number for each class."""
    classes, found, waiting = value(logits).shape[-1:], set(), [logits]
    while waiting:
        node = waiting.pop()
        found.add(node)
        waiting += [user for user in node.users if user not in found and _last_size(user) == classes]
    return any(user.op == "output" for node in found for user in node.users)


def _last_size(node: fx.Node) -> Any:
    example = value(node)
    return example.shape[-1:] if isinstance(example, torch.Tensor) else None


def _drop(loss: fx.Node, given: dict[str, Any], chain: LossChain) -> None:
    """No logits."""
    x, weight, bias = chain.head.args
    for node in chain.slices:
        x = _slice_of(x, node, loss)
    args = (x, weight, bias, given["target"], given["ignore_index"], chain.scale, chain.soft_cap)
    new = _emit_op(torch.ops.qlora.linear_cross_entropy.default, args, loss, chain)
    _replace_loss(loss, new, given)
    _drop_from_outputs(chain)


def _keep(loss: fx.Node, given: dict[str, Any], chain: LossChain, ctx: PassContext) -> None:
    """The logits, which the graph returns, without the gradient of them that nobody asks for."""
    x, weight, bias = chain.head.args
    output = loss.graph.output_node()
    if _trains(weight, ctx) or (bias is not None and _trains(bias, ctx)):
        raise DeclinedError("the head trains")
    if not any(output in node.users for node in chain.nodes):
        return _drop(loss, given, chain)
    if bias is not None and chain.soft_cap:
        raise DeclinedError("the head has a bias below a soft cap")
    if not _is_differentiated(x):
        raise DeclinedError("nothing is differentiated")
    kept, changed = _returned(chain, output)
    if ctx.kept_logits:
        raise DeclinedError("the graph returns the logits of another loss")
    args = (x, weight, bias, given["target"], given["ignore_index"], chain.scale, chain.soft_cap)
    both = _emit_op(torch.ops.qlora.linear_cross_entropy_logits.default, args, loss, chain)
    new = emit(loss, operator.getitem, (both, 0), loss)
    logits = emit(loss, operator.getitem, (both, 1), chain.head)
    both.meta["example_value"] = [_scalar(loss, torch.float32), value(chain.head)]
    logits.meta["example_value"] = value(chain.head)
    copies = {chain.head: logits}
    for node in kept[1:]:
        with loss.graph.inserting_before(loss):
            copies[node] = loss.graph.node_copy(node, lambda n: copies.get(n, n))
    _replace_loss(loss, new, given)
    (outs,) = output.args
    function = (chain.scale, chain.soft_cap) if changed else (1.0, 0.0)
    ctx.kept_logits = tuple(KeptLogits(i, weight.name, *function) for i, node in enumerate(outs) if node is kept[-1])
    output.args = ((*(copies[kept[-1]] if node is kept[-1] else node for node in outs), x),)


def _emit_op(op: Any, args: tuple[Any, ...], loss: fx.Node, chain: LossChain) -> fx.Node:
    """The op in the loss's place; its module is the head, whose product it computes."""
    new = emit(loss, op, args, loss)
    if "nn_module_stack" in chain.head.meta:
        new.meta["nn_module_stack"] = chain.head.meta["nn_module_stack"]
    return new


def _trains(tensor: Any, ctx: PassContext) -> bool:
    """Whether a head's weight or bias trains, or may: nobody knows it."""
    owner = ctx.param(tensor)
    return owner is None or ctx.edits.trains(owner)


def _returned(chain: LossChain, output: fx.Node) -> tuple[list[fx.Node], bool]:
    """The nodes from the head to what the graph returns, and whether f is among them. Raises DeclinedError."""
    returned = [i for i, node in enumerate(chain.nodes) if output in node.users]
    if len(returned) != 1 or chain.slices:
        raise DeclinedError("the graph returns the logits twice, or more of them than the loss reads")
    kept, later = chain.nodes[: returned[0] + 1], chain.nodes[returned[0] + 1 :]
    changed = any(node in chain.changes for node in kept)
    if (changed and any(node in chain.changes for node in later)) or any(node in chain.reshapes for node in kept):
        raise DeclinedError("the graph returns the logits half changed")
    return kept, changed


def _replace_loss(loss: fx.Node, new: fx.Node, given: dict[str, Any]) -> None:
    """The sum of the losses in fp32 -> what the graph's loss is, in the loss's place."""
    new.meta["example_value"] = _scalar(loss, torch.float32)
    if given["reduction"] == "mean":
        counted = emit_valued(loss, operator.ne, (given["target"], given["ignore_index"]), loss)
        rows = emit_valued(loss, "sum", (counted,), loss, method=True)
        new = emit(loss, operator.truediv, (new, rows), loss)
    if dtype_of(loss) != torch.float32:
        new.meta["example_value"] = _scalar(loss, torch.float32)
        new = emit(loss, "to", (new, dtype_of(loss)), loss, method=True)
    replace(loss, new)


def _scalar(like: fx.Node, dtype: torch.dtype) -> Any:
    example = value(like)
    return example.to(dtype) if isinstance(example, torch.Tensor) else None


def _slice_of(x: Any, node: fx.Node, before: fx.Node) -> fx.Node:
    """The tokens that the logits' slice keeps, taken from the head's input: the last dimension is whole in both."""
    return emit_valued(before, operator.getitem, (x, node.args[1]), node)


def _drop_from_outputs(chain: LossChain) -> None:
    """The graph's output has None where it had logits: Dynamo builds the model's output from these slots."""
    output = chain.head.graph.output_node()
    output.args = fx.map_arg(output.args, lambda node: None if node in chain.nodes else node)
