"""What a graph's nodes compute: FLOPs, 2 per multiply-add, of products and attention.

The formulas of our ops stand in torch's own registry: so `FlopCounterMode` counts them, and AOTAutograd's partitioner
knows under an activation budget that computing a `lora_linear` again is not free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import (  # noqa: F401  they define the ops that get a formula here
    attention_ops,
    expert_ops,
    linear_cross_entropy,
    ops,
    wide_ops,
)
from .fx_utils import any_value, called_graph, hint

_ops, _aten = torch.ops.qlora, torch.ops.aten


def _names(op: Any) -> list[str]:
    return [argument.name for argument in op.default._schema.arguments]


_FORWARD_NAMES, _BACKWARD_NAMES = _names(_ops.lora_linear), _names(_ops.lora_linear_backward)


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _size(factors: Sequence[Tensor]) -> int:
    return sum(factor.numel() for factor in factors)


@register_flop_formula(_ops.lora_linear, get_raw=True)
def _lora_linear(*args: Any, **kwargs: Any) -> int:
    given = dict(zip(_FORWARD_NAMES, args))
    x = given["x"]
    dense = sum(given["out_features"]) * x.shape[-1]
    return 2 * _rows(x) * (dense + _size(given["lora_a"]) + _size(given["lora_b"]))


@register_flop_formula(_ops.lora_linear_backward, get_raw=True)
def _lora_linear_backward(*args: Any, **kwargs: Any) -> int:
    given = dict(zip(_BACKWARD_NAMES, args))
    x, a, b = given["x"], _size(given["lora_a"]), _size(given["lora_b"])
    dx = sum(dy.shape[-1] for dy in given["grads"]) * x.shape[-1] + a if given["need_dx"] else 0
    return 2 * _rows(x) * (b + (a + b if given["need_adapters"] else 0) + dx)


@register_flop_formula(_ops.grouped_lora_linear, get_raw=True)
def _grouped_lora_linear(*args: Any, **kwargs: Any) -> int:
    """Each row meets one expert's matrix and its adapters, whichever that is."""
    given = dict(zip(_names(_ops.grouped_lora_linear), args))
    (rows, k), n, rank = given["x"].shape, given["out_features"], sum(a.shape[1] for a in given["lora_a"])
    return int(2 * rows * (k * n + rank * (k + n)))


@register_flop_formula(_ops.grouped_lora_linear_backward, get_raw=True)
def _grouped_lora_linear_backward(*args: Any, **kwargs: Any) -> int:
    given = dict(zip(_names(_ops.grouped_lora_linear_backward), args))
    (rows, k), n, rank = given["x"].shape, given["dy"].shape[1], sum(a.shape[1] for a in given["lora_a"])
    dx = k * n + rank * k if given["need_dx"] else 0
    return int(2 * rows * (rank * n + dx + (rank * (k + n) if given["need_adapters"] else 0)))


@register_flop_formula([_ops.linear_cross_entropy, _ops.linear_cross_entropy_logits, _ops.wide_linear], get_raw=True)
def _one_product(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _rows(x) * weight.numel()


@register_flop_formula(_ops.linear_cross_entropy_grads, get_raw=True)
def _linear_cross_entropy_grads(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    need_dx, need_dw = args[5:7]
    return 2 * _rows(x) * weight.numel() * (1 + need_dx + need_dw)


@register_flop_formula(_ops.wide_linear_backward, get_raw=True)
def _wide_linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, need_dx: bool, *args: Any, **kwargs: Any
) -> int:
    return 2 * _rows(dy) * weight.numel() * (need_dx + (x is not None))


@register_flop_formula(_ops.wide_matmul, get_raw=True)
def _matmul(a: Tensor, b: Tensor, *args: Any, out_val: Tensor | None, **kwargs: Any) -> int:
    """Batches broadcast, so the output's shape is needed; a pass's new node may not have one yet."""
    return 0 if out_val is None else 2 * out_val.numel() * a.shape[-1]


@register_flop_formula(_ops.attention, get_raw=True)
def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    """Scores and their product with the values."""
    *rows, size = q.shape
    return 2 * math.prod(rows) * k.shape[-2] * (size + v.shape[-1])


@register_flop_formula(_ops.attention_backward, get_raw=True)
def _attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    """The scores again, then dP, dV, dQ and dK."""
    *rows, size = q.shape
    return 2 * math.prod(rows) * k.shape[-2] * (3 * size + 2 * v.shape[-1])


# torch 2.13 counts the CUDA kernels of attention but not the CPU's; a later one may
flop_registry.setdefault(_aten._scaled_dot_product_flash_attention_for_cpu, _attention)
flop_registry.setdefault(_aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward)


def partitioner_settings(activation_budget: float) -> dict[str, Any]:
    """torch._functorch's configuration for this share of activations to keep; nothing at 1.

    The second setting has the partitioner weigh ops that are not torch's by their FLOPs as well: it would take them for
    free otherwise, and any budget below 1 would recompute every linear.
    """
    if activation_budget >= 1:
        return {}
    return {"activation_memory_budget": activation_budget, "is_non_builtin_to_include": True}


def _linear(x: Tensor, weight: Tensor, out_val: Tensor | None) -> int:
    return 2 * _rows(x) * weight.numel()


def _addmm(bias: Tensor, a: Tensor, b: Tensor, out_val: Tensor | None) -> int:
    return 2 * a.numel() * b.shape[-1]


# What Dynamo's graphs, and so all stages before AOTAutograd's, call, with the names of the arguments that count; a string
# is a tensor's method.
_PYTHON: dict[Any, tuple[tuple[str, ...], Callable[..., Any]]] = {
    F.linear: (("input", "weight"), _linear),
    torch.addmm: (("input", "mat1", "mat2"), _addmm),
    F.scaled_dot_product_attention: (("query", "key", "value"), _attention),
    **dict.fromkeys((torch.matmul, operator.matmul, "matmul"), (("input", "other"), _matmul)),
    **dict.fromkeys((torch.mm, torch.bmm, "mm", "bmm"), (("input", "mat2"), _matmul)),
}


def node_flops(node: fx.Node) -> int:
    """FLOPs of a product, an attention or a region with such in it; 0 for everything else, or where its value is unknown.

    Symbolic sizes count as they were when the graph was traced; no guard is made.
    """
    region = called_graph(node)
    if region is not None:
        return sum(map(node_flops, region.nodes))
    if any(any_value(source) is None for source in node.all_input_nodes):
        return 0
    if isinstance(node.target, torch._ops.OpOverload):
        formula = flop_registry.get(node.target._overloadpacket)
        if formula is None:
            return 0
        return hint(formula(*_values(node.args), **_values(node.kwargs), out_val=any_value(node)))
    names, formula = _PYTHON.get(node.target, ((), None)) if node.op.startswith("call_") else ((), None)
    given = dict(zip(names, node.args)) | node.kwargs
    if formula is None or not given.keys() >= set(names):
        return 0
    return hint(formula(*(_values(given[name]) for name in names), out_val=any_value(node)))


def _values(tree: Any) -> Any:
    return fx.node.map_aggregate(tree, lambda value: any_value(value) if isinstance(value, fx.Node) else value)
