"""Dense bf16 (fp16) products -> the same in fp32 with one rounding, where the CPU is slow at the former.

    linear(x, W, b)                 ->  qlora.wide_linear(x, W, b, "fused_fp32" or "fp32_gemm")
    matmul(a, b), bmm(a, b), a @ b  ->  qlora.wide_matmul(a, b)

Whether it is slow, the kernels' table says (`ctx.choose`): a processor with bf16 matrix instructions keeps its graph.
`kernels={"dense_linear": "library_gemm"}` switches the rewrite off.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from .. import wide_ops
from ..fx_utils import dtype_of, emit, hint, is_call, is_linear, replace, value
from ..pass_manager import PassContext

_MATMULS = (torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
_HALVES = (torch.bfloat16, torch.float16)


def widen_matmuls(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of products rewritten."""
    count = 0
    for node in list(gm.graph.nodes):
        if dtype_of(node) not in _HALVES or value(node).device.type != "cpu":
            continue
        if is_linear(node):
            count += _linear(node, ctx)
        elif is_call(node, *_MATMULS) and len(node.args) == 2 and not node.kwargs:
            count += _matmul(node, ctx)
    return count


def _chosen(node: fx.Node, rows: int, n: int, k: int, ctx: PassContext, barred: tuple[Any, ...] = ()) -> str:
    """The kernel in fp32 that the table has for the product; empty where it stays as it is."""
    like = value(node)
    sizes = {"rows": rows, "n": (n,), "k": k, "dtype": like.dtype, "device": like.device.type}
    choice = ctx.choose("dense_linear", barred=barred, **sizes)
    if choice is None or choice.name not in (wide_ops.FUSED, wide_ops.LIBRARY):
        return ""
    node.meta["qlora_kernels"] = (("dense_linear", choice),)
    return str(choice.name)


def _rewrite(node: fx.Node, target: Any, args: tuple[Any, ...]) -> int:
    replace(node, emit(node, target, args, node))
    return 1


def _linear(node: fx.Node, ctx: PassContext) -> int:
    x, weight, bias = (*node.args, None)[:3] if not node.kwargs else (None, None, None)
    if value(x) is None or any(dtype_of(t) != dtype_of(node) for t in (x, weight)):
        return 0
    n, k = (hint(size) for size in value(weight).shape)
    name = _chosen(node, math.prod(map(hint, value(x).shape[:-1])), n, k, ctx)
    return _rewrite(node, torch.ops.qlora.wide_linear.default, (x, weight, bias, name)) if name else 0


def _matmul(node: fx.Node, ctx: PassContext) -> int:
    a, b = node.args
    shapes: list[Any] = [value(t).shape if isinstance(value(t), torch.Tensor) else () for t in (a, b)]
    if min(map(len, shapes)) < 2 or any(dtype_of(t) != dtype_of(node) for t in (a, b)):
        return 0
    rows = math.prod(map(hint, shapes[0][:-1]))
    if not _chosen(node, rows, hint(shapes[1][-1]), hint(shapes[1][-2]), ctx, wide_ops.NO_BATCHES):
        return 0
    return _rewrite(node, torch.ops.qlora.wide_matmul.default, (a, b))
