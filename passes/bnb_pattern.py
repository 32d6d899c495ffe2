"""bitsandbytes' 4-bit product as a pattern, in the three forms that Dynamo traces.

gemm_4bit(x, W, shape, ...)                       where x needs no gradient
autograd_function_apply(fwd, bwd, ...)[0]         where it does: fwd holds that same call
gemv_4bit(x, W, shape, absmax, code, block size)  on a CPU with AVX-512, once the model was evaluated there
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_utils import is_call
from ..pass_manager import target_name

_GEMM, _GEMV = "bitsandbytes.gemm_4bit", "bitsandbytes.gemv_4bit"
_APPLY = torch.ops.higher_order.autograd_function_apply


@dataclass
class BnbProduct:
    """One product: the node of its result, and its operands in the outer graph. `absmax_8bit` only if scales are codes."""

    result: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    absmax: fx.Node  # fp32: of the values, or of the scales where those are codes
    absmax_8bit: fx.Node | None
    absmax_offset: fx.Node | None
    repacked: bool


def read_product(node: fx.Node, gm: fx.GraphModule) -> BnbProduct | None:
    """The product that this node is the result of, or None."""
    if node.op == "call_function" and target_name(node) in (_GEMM, _GEMV):
        return _product(node, node, {})
    if is_call(node, operator.getitem) and node.args[1] == 0 and is_call(node.args[0], _APPLY):
        apply: Any = node.args[0]
        inner = _forward_call(apply, gm)
        if inner is not None and len(apply.users) == 1 and _is_matmul_backward(apply, gm):
            call, names = inner
            return _product(node, call, names)
    return None


def _product(result: fx.Node, call: fx.Node, outer: dict[fx.Node, fx.Node]) -> BnbProduct | None:
    schema = call.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), call.args)) | dict(call.kwargs)
    nodes = {name: outer.get(node, node) for name, node in given.items() if isinstance(node, fx.Node)}
    weight = _unviewed(given["B"], outer)
    if weight.op != "placeholder":
        return None
    return BnbProduct(
        result,
        nodes["A"],
        weight,
        nodes.get("bias"),
        nodes["absmax"],
        nodes.get("absmax_8bit"),
        nodes.get("absmax_offset"),
        repacked=target_name(call) == _GEMV,
    )


def _unviewed(node: Any, outer: dict[fx.Node, fx.Node]) -> fx.Node:
    """The weight under `B.view(-1, 1)`, inside and outside of the autograd function."""
    node = outer.get(node, node)
    while is_call(node, "view"):
        node = outer.get(node.args[0], node.args[0])
    return node


def _body(node: Any, gm: fx.GraphModule) -> fx.Graph | None:
    body = getattr(gm, str(node.target), None) if isinstance(node, fx.Node) and node.op == "get_attr" else None
    return body.graph if isinstance(body, fx.GraphModule) else None


def _forward_call(apply: fx.Node, gm: fx.GraphModule) -> tuple[fx.Node, dict[fx.Node, fx.Node]] | None:
    """(the gemm call inside, inner placeholder -> outer operand) where the function's forward is that call alone."""
    graph = _body(apply.args[0], gm)
    if graph is None:
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if node.op == "call_function" and target_name(node) == _GEMM]
    others = [node for node in graph.nodes if node.op.startswith("call") and node not in calls]
    if len(calls) != 1 or len(inputs) != len(apply.args) - 2:
        return None
    if any(target_name(node) not in ("view", "_set_grad_enabled") for node in others):
        return None
    output: Any = graph.output_node().args[0]
    if output[0][0] is not calls[0]:
        return None
    return calls[0], dict(zip(inputs, apply.args[2:]))  # type: ignore[arg-type]


def _is_matmul_backward(apply: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the backward is `grad @ dequantize_4bit(W)`, the linear's own (or none, where only the bias trains)."""
    graph = _body(apply.args[1], gm)
    names = [target_name(node) for node in graph.nodes if node.op.startswith("call")] if graph else []
    products = sum(name in ("matmul", "mm") for name in names)
    return graph is not None and products == names.count("bitsandbytes.dequantize_4bit") <= 1
