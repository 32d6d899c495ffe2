"""What an op of ours allocates inside itself while it runs: copies, casts and reused buffers that no graph shows.

Follows `lora_group.py` line by line; the estimate's tests compare it with what the allocator counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

_FORWARD = torch.ops.qlora.lora_linear.default
_BACKWARD = torch.ops.qlora.lora_linear_backward.default
_EXPERTS = (torch.ops.qlora.grouped_lora_linear.default, torch.ops.qlora.grouped_lora_linear_backward.default)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The op's arguments by the names in its schema, tensors as their fake values."""
    target: Any = node.target
    values: Any = fx.node.map_aggregate(node.args, lambda v: v.meta.get("val") if isinstance(v, fx.Node) else v)
    return dict(zip((argument.name for argument in target._schema.arguments), values))


def workspace_bytes(node: fx.Node) -> list[int]:
    """Bytes alive inside the op at its widest moment, one number for each part that scales alike."""
    if node.target is _FORWARD:
        given = named_arguments(node)
        x, dtype = given["x"], given["dtype"]
        tokens = math.prod(x.shape[:-1])
        if x.dtype == dtype:
            return []
        return [tokens * (x.shape[-1] + max(given["out_features"])) * dtype.itemsize]  # x, and y before its cast back
    return [_backward_bytes(named_arguments(node))] if node.target is _BACKWARD else []


def _backward_bytes(given: dict[str, Any]) -> int:
    grads, x, dtype, need_dx = given["grads"], given["x"], given["dtype"], given["need_dx"]
    tokens, width, n = math.prod(x.shape[:-1]), dtype.itemsize, sum(given["out_features"])
    ranks = sum(a.shape[0] for a in given["lora_a"])
    cast = tokens * (n + x.shape[-1]) * width if x.dtype != dtype else 0
    copied = sum(tokens * g.shape[-1] * width for g in grads if x.dtype == dtype and not g.is_contiguous())
    low = tokens * ranks * width
    joined = tokens * (n + ranks) * width if need_dx and (len(grads) > 1 or ranks) else 0
    uncast = tokens * x.shape[-1] * width if need_dx and x.dtype != dtype else 0
    return cast + copied + low + joined + uncast


def scratch_bytes(node: fx.Node) -> dict[str, int]:
    """The reused buffers that the op needs, by name: they grow to the largest and are never given back."""
    if node.target in _EXPERTS:
        return _expert_scratch(named_arguments(node))
    if node.target not in (_FORWARD, _BACKWARD):
        return {}
    given = named_arguments(node)
    k, dtype, rows = given["x"].shape[-1], given["dtype"], given["out_features"]
    if node.target is _FORWARD:
        return {f"weight {dtype}": max(rows) * k * dtype.itemsize} if given["quant_type"] != "none" else {}
    ranks = 0 if given["dropout"] else sum(a.shape[0] for a in given["lora_a"])
    return {f"stacked {dtype}": (sum(rows) + ranks) * k * dtype.itemsize} if given["need_dx"] else {}


def _expert_scratch(given: dict[str, Any]) -> dict[str, int]:
    """One expert's dense matrix at a time; a dense weight of another dtype is cast into a fresh tensor instead."""
    n = given["dy"].shape[1] if "dy" in given else given["out_features"]
    dtype, quantized = given["dtype"], given["quant_type"] != "none"
    return (
        {f"weight {dtype}": n * given["x"].shape[1] * dtype.itemsize}
        if quantized and given.get("need_dx", True)
        else {}
    )
