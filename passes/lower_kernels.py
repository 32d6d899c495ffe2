"""Which kernel runs each lora_linear, forward and backward: asked for, measured if wanted, recorded for the report.

    lora_linear(x, ...)  ->  lora_linear(x, ..., "fp32_gemm", "library_gemm")   where the option `kernels` forces them

Without the option the op's arguments stay: it asks the same table again for the number of rows that it gets, since one
graph may run with several. What a kernel is, only the runtime knows; a pass sees names and reasons (`ctx.choose`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..fx_utils import hint, is_call, value
from ..pass_manager import PassContext

_OP = torch.ops.qlora.lora_linear.default
_LORA_A, _DROPOUT, _OUT_FEATURES, _QUANT_TYPE, _BLOCK_SIZE, _DTYPE = 6, 12, 13, 14, 15, 16


def lower_kernels(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of ops whose kernels were chosen."""
    count = 0
    for node in gm.graph.nodes:
        if is_call(node, _OP) and isinstance(value(node.args[0]), torch.Tensor):
            count += _lower(node, ctx)
    return count


def _lower(node: fx.Node, ctx: PassContext) -> int:
    chosen: list[tuple[str, Any]] = []
    for op in ("lora_linear", "lora_linear_backward"):
        choice = ctx.choose(op, **_sizes(node))
        if choice is not None:
            chosen.append((op, choice))
    node.meta["qlora_kernels"] = tuple(chosen)
    forced = [ctx.config.kernels.get(op, "") for op in ("lora_linear", "lora_linear_backward")]
    if any(forced):
        node.args = (*node.args[: _DTYPE + 1], *forced)
    return bool(chosen)


def _sizes(node: fx.Node) -> dict[str, Any]:
    args: tuple[Any, ...] = node.args
    x = value(args[0])
    return {
        "rows": math.prod(hint(size) for size in x.shape[:-1]),
        "n": tuple(args[_OUT_FEATURES]),
        "k": hint(x.shape[-1]),
        "rank": sum(hint(value(a).shape[0]) for a in args[_LORA_A] if value(a) is not None),
        "dtype": args[_DTYPE],
        "quant_type": args[_QUANT_TYPE],
        "block_size": args[_BLOCK_SIZE],
        "device": x.device.type,
        "dropout": bool(args[_DROPOUT]),
    }
