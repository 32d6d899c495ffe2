"""Activation checkpoints and marked regions -> their contents, in the flat graph where every other pass sees them.

    tag_activation_checkpoint(body, x, W)[0]  ->  linear(x, W)      each node marked: computed again in backward
    invoke_subgraph(body, name, x, W)[0]      ->  linear(x, W)      no mark (nested_compile_region, and the layers that
                                                                    `layer_tracing` traced as one: outline_layers finds
                                                                    equal layers again)

The marks, `recompute` and `ac_graph_id` in `node.meta`, are those that AOTAutograd's partitioner reads; torch 2.13 sets
them itself when it traces the body. Selective checkpointing (`context_fn`) decides by ATen operator while it traces: such
a region stays as it is, and what is inside is not fused.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..fx_utils import RECOMPUTE, copy_graph, is_call, is_linear
from ..layer_tracing import STACK
from ..pass_manager import PassContext

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_REGION = torch.ops.higher_order.invoke_subgraph


def inline_checkpoints(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of regions put in line; one inside another belongs to the outer one."""
    count = 0
    while calls := [node for node in gm.graph.nodes if _is_candidate(node) and _reason(node) is None]:
        for node in calls:
            count += 1
            _inline(gm, node, count)
    if count:
        gm.delete_all_unused_submodules()
    for node in gm.graph.nodes:
        if _is_candidate(node):
            ctx.decline(node.name, f"nothing inside it is fused: {_reason(node)}")
    return count


def _is_candidate(node: fx.Node) -> bool:
    """A checkpoint, or a marked region with linears in it: one without gains nothing from being flat."""
    if is_call(node, _CHECKPOINT):
        return True
    return is_call(node, _REGION) and any(is_linear(inner) for g in _graphs(_body(node)) for inner in g.nodes)


def _body(call: fx.Node) -> fx.GraphModule:
    owner = call.graph.owning_module
    assert owner is not None
    body = owner.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    return body


def _graphs(body: fx.GraphModule) -> list[fx.Graph]:
    return [module.graph for module in body.modules() if isinstance(module, fx.GraphModule)]


def _reason(call: fx.Node) -> str | None:
    """Why the region stays."""
    if "_checkpoint_context_fn" in _body(call).meta:
        return "its context_fn chooses what is kept (activation_budget does so for the whole graph)"
    if not all(is_call(user, operator.getitem) for user in call.users):
        return "its results are used as one tuple"
    return None


def _inline(gm: fx.GraphModule, call: fx.Node, region: int) -> None:
    """Put the body's nodes in the call's place."""
    body = _body(call)
    operands = call.args[1:] if is_call(call, _CHECKPOINT) else call.args[2:]
    inherited = {key: call.meta[key] for key in RECOMPUTE if key in call.meta}  # of the region around this one
    marks = inherited or (_marks(region) if is_call(call, _CHECKPOINT) else {})
    results = _copy(gm, call, body, operands, marks)
    for user in list(call.users):
        result = results[user.args[1]]  # type: ignore[index]
        if STACK in body.meta:
            result.meta["example_value"] = user.meta["example_value"]  # all calls of the body share the others
        user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
    attribute = call.args[0]
    gm.graph.erase_node(call)
    if not attribute.users:  # type: ignore[union-attr]
        gm.graph.erase_node(attribute)  # type: ignore[arg-type]


def _marks(region: int) -> dict[str, Any]:
    return dict(zip(RECOMPUTE, (CheckpointPolicy.PREFER_RECOMPUTE, region), strict=True))


def _copy(
    gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, operands: Sequence[Any], marks: dict[str, Any]
) -> Sequence[Any]:
    """Copy the body before the call; returns what stands for each of its results."""
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    env: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            given = node.args[0]
            return [env[result] if isinstance(result, fx.Node) else result for result in given]
        with gm.graph.inserting_before(call):
            new = gm.graph.node_copy(node, lambda inner: env[inner])
        if node.op == "get_attr":
            # of a custom autograd function's two subgraphs, the forward one only
            own = marks if all(user.args[0] is node for user in node.users) else {}
            new.target = _adopt(gm, body, str(node.target), own)
        else:
            new.meta |= marks
        if STACK in body.meta and "nn_module_stack" in new.meta:
            new.meta["nn_module_stack"] = _moved(
                new.meta["nn_module_stack"], body.meta[STACK], call.meta["nn_module_stack"]
            )
        env[node] = new
    raise AssertionError("an FX graph ends with its output")


def _moved(stack: dict[str, Any], traced: dict[str, Any], called: dict[str, Any]) -> dict[str, Any]:
    """The modules around a node of the traced layer, as they are around the called one."""
    if traced == called:
        return stack
    old, new = (next(reversed(layers.values()))[0] for layers in (traced, called))
    inner = {k: (new + path.removeprefix(old), kind) for k, (path, kind) in stack.items() if k not in traced}
    return called | inner


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: str, marks: dict[str, Any]) -> str:
    """What the body holds under this name (a subgraph, a constant), put on the graph's own module; its new name."""
    value: Any = body
    for part in target.split("."):
        value = getattr(value, part)
    name = next(name for number in range(10**6) if not hasattr(gm, name := f"{part}_inlined_{number}"))
    if isinstance(value, fx.GraphModule):
        value = copy_graph(value)  # Dynamo goes on using its own
        for node in value.graph.nodes:
            node.meta |= marks
    setattr(gm, name, value)
    return name
