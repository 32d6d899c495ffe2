"""Which kernel runs each op of ours, forward and backward: asked for, measured if wanted, recorded for the report.

    lora_linear(x, ...)  ->  lora_linear(x, ..., "fp32_gemm", "library_gemm")   where the option `kernels` forces them

The same for the linears of experts (`grouped_lora_linear`) and for the loss (`linear_cross_entropy`). Without the option an
op's arguments stay: it asks the same table again for the number of rows that it gets, since one graph may run with several.
What a kernel is, only the runtime knows; a pass sees names and reasons (`ctx.choose`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .. import (
    cross_entropy_sweep,
    expert_products,
    linear_cross_entropy,  # noqa: F401  defines its ops
)
from ..fx_utils import hint, is_call, value
from ..pass_manager import PassContext

_OPS = torch.ops.qlora


def lower_kernels(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of ops whose kernels were chosen."""
    count = 0
    for node in gm.graph.nodes:
        for targets, names, sizes in _KINDS:
            if is_call(node, *targets) and isinstance(value(node.args[0]), torch.Tensor):
                count += _lower(node, names, sizes, ctx)
    return count


def _lower(node: fx.Node, names: dict[str, str], sizes: Callable[[fx.Node], dict[str, Any]], ctx: PassContext) -> int:
    """`names`: ops of the table -> the argument of the graph's op that forces a kernel for it."""
    given = sizes(node)
    choices = [(op, ctx.choose(op, **given)) for op in names]
    node.meta["qlora_kernels"] = chosen = tuple((op, choice) for op, choice in choices if choice is not None)
    forced = {argument: ctx.config.kernels.get(op, "") for op, argument in names.items()}
    if any(forced.values()):
        node.args = (*node.args[: _parameters(node).index(next(iter(forced)))], *forced.values())
    return bool(chosen)


def _parameters(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments by name, nodes as they are."""
    return dict(zip(_parameters(node), node.args))


def _rows(x: torch.Tensor) -> int:
    return math.prod(hint(size) for size in x.shape[:-1])


def _linear(node: fx.Node) -> dict[str, Any]:
    given = _given(node)
    x = value(given["x"])
    return {
        "rows": _rows(x),
        "n": tuple(given["out_features"]),
        "k": hint(x.shape[-1]),
        "rank": sum(hint(value(a).shape[0]) for a in given["lora_a"] if value(a) is not None),
        **{name: given[name] for name in ("dtype", "quant_type", "block_size")},
        "device": x.device.type,
        "dropout": bool(given["dropout"]),
    }


def _experts(node: fx.Node) -> dict[str, Any]:
    given = _given(node)
    x = value(given["x"])
    a, b = ([value(t) for t in given[name] if value(t) is not None] for name in ("lora_a", "lora_b"))
    kind = (given[name] for name in ("dtype", "quant_type", "block_size"))
    sizes = expert_products.problem((given["out_features"], hint(x.shape[-1])), a, b, *kind)
    return {"rows": _rows(x), "device": x.device.type} | sizes


def _loss(node: fx.Node) -> dict[str, Any]:
    x, weight, bias = (value(node.args[i]) for i in range(3))
    loss = value(node)
    differentiated = (loss[0] if isinstance(loss, (list, tuple)) else loss).requires_grad
    trained = differentiated and any(t.requires_grad for t in (weight, bias) if t is not None)
    return {"rows": _rows(x)} | cross_entropy_sweep.problem(x, weight, bias, trained)


_KINDS: tuple[tuple[tuple[Any, ...], dict[str, str], Callable[[fx.Node], dict[str, Any]]], ...] = (
    (
        (_OPS.lora_linear.default,),
        {"lora_linear": "forward_kernel", "lora_linear_backward": "backward_kernel"},
        _linear,
    ),
    (
        (_OPS.grouped_lora_linear.default,),
        {"grouped_lora_linear": "forward_kernel", "grouped_lora_linear_backward": "backward_kernel"},
        _experts,
    ),
    (
        (_OPS.linear_cross_entropy.default, _OPS.linear_cross_entropy_logits.default),
        {"linear_cross_entropy": "loss_kernel"},
        _loss,
    ),
)
