"""Dense bf16 (fp16) products and attention -> the same in fp32 with one rounding, where the CPU is slow at the former.

    linear(x, W, b)                        ->  qlora.wide_linear(x, W, b)
    matmul(a, b), bmm(a, b), a @ b         ->  qlora.wide_matmul(a, b)
    scaled_dot_product_attention(q, k, v)  ->  qlora.wide_attention(q, k, v, mask, causal, scale)[0]

Whether it is slow, the kernels' table says (`ctx.choose`): a processor with bf16 matrix instructions keeps its graph.
`kernels={"dense_linear": "library_gemm", "attention": "library"}` switches the rewrite off.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .. import wide_ops  # noqa: F401  defines the ops
from ..fx_utils import dtype_of, emit, hint, is_call, is_linear, replace, value
from ..pass_manager import PassContext

_MATMULS = (torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
_ATTENTION = F.scaled_dot_product_attention
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
        elif is_call(node, _ATTENTION):
            count += _attention(node, ctx)
    return count


def _wanted(node: fx.Node, op: str, rows: int, n: int, k: int, ctx: PassContext) -> bool:
    choice = ctx.choose(op, rows=rows, n=(n,), k=k, dtype=value(node).dtype, device=value(node).device.type)
    if choice is None or choice.name not in ("fp32_gemm", "fp32"):
        return False
    node.meta["qlora_kernels"] = ((op, choice),)
    return True


def _rewrite(node: fx.Node, target: Any, args: tuple[Any, ...], *, first: bool = False) -> int:
    new = emit(node, target, args, node)
    if first:
        new.meta.pop("example_value", None)
        replace(node, emit(node, operator.getitem, (new, 0), node))
    else:
        replace(node, new)
    return 1


def _linear(node: fx.Node, ctx: PassContext) -> int:
    x, weight, bias = (*node.args, None)[:3] if not node.kwargs else (None, None, None)
    if value(x) is None or any(dtype_of(t) != dtype_of(node) for t in (x, weight)):
        return 0
    n, k = (hint(size) for size in value(weight).shape)
    if not _wanted(node, "dense_linear", math.prod(map(hint, value(x).shape[:-1])), n, k, ctx):
        return 0
    return _rewrite(node, torch.ops.qlora.wide_linear.default, (x, weight, bias))


def _matmul(node: fx.Node, ctx: PassContext) -> int:
    a, b = node.args
    shapes: list[Any] = [value(t).shape if isinstance(value(t), torch.Tensor) else () for t in (a, b)]
    if min(map(len, shapes)) < 2 or any(dtype_of(t) != dtype_of(node) for t in (a, b)):
        return 0
    rows = math.prod(map(hint, shapes[0][:-1]))
    if not _wanted(node, "dense_linear", rows, hint(shapes[1][-1]), hint(shapes[1][-2]), ctx):
        return 0
    return _rewrite(node, torch.ops.qlora.wide_matmul.default, (a, b))


def _attention(node: fx.Node, ctx: PassContext) -> int:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, node.args)) | node.kwargs
    q, k, v, mask = (given.get(name) for name in names[:4])
    reason = _decline_attention(given)
    if reason is not None:
        ctx.decline(node.name, f"attention stays as it is: {reason}")
        return 0
    _, queries, size = (hint(s) for s in value(q).shape[1:])
    if not _wanted(node, "attention", queries, hint(value(k).shape[2]), size, ctx):
        return 0
    scale = given.get("scale")
    args = (q, k, v, mask, bool(given.get("is_causal", False)), 1 / math.sqrt(size) if scale is None else scale)
    return _rewrite(node, torch.ops.qlora.wide_attention.default, args, first=True)


def _decline_attention(given: dict[str, Any]) -> str | None:
    shapes = [value(given[name]).shape for name in ("query", "key", "value")]
    mask = value(given.get("attn_mask"))
    if given.get("dropout_p", 0.0) != 0.0:
        return "it drops out"
    if any(len(shape) != 4 for shape in shapes):
        return "it has not four dimensions"
    if not shapes[0][:2] == shapes[1][:2] == shapes[2][:2]:
        return "queries and keys have different numbers of heads"
    if not isinstance(given.get("scale"), (int, float, type(None))):
        return "its scale is computed"
    if mask is not None and (mask.requires_grad or mask.dim() not in (2, 3, 4)):
        return "its mask trains or has other dimensions"
    return None
