"""Frozen dense weight of a linear -> its 4-bit codes and scales, dequantized where the product needs it.

    linear(x, W, b)  ->  linear(x.to(c), dequantize_4bit(codes, absmax, scale, offset), b.to(c)).to(x.dtype)

c is the compute dtype. A weight that is quantized already (a prepared model, a retrace) reads the same way. A weight
that anything but linears uses (tied to an embedding) stays dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..fx_utils import dtype_of, emit, is_linear, module_path, peel_casts, peel_transposes, placeholders
from ..param_info import ParamInfo, StateRef, is_linear_module
from ..pass_manager import PassContext
from .lora_pattern import cast

_PARTS = ("codes", "absmax", "absmax_scale", "absmax_offset")


def quantize_weights(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Quantize each target weight once, however many linears use it; returns the number of linears rewritten."""
    count = 0
    for weight in placeholders(gm.graph):
        entry = ctx.param(weight)
        linears = linears_of(weight) if entry else []
        if entry is None or linears is None or not linears:
            if entry is not None and linears is None and _has_linear(weight):
                other_use = "something other than a linear uses its weight"
                ctx.decline(entry.name, ctx.edits.decline_reason(entry) or other_use)
            continue
        transposed = {peel_transposes(linear.args[1])[1] for linear in linears}
        reason = decline_reason(entry, transposed, ctx)
        if reason is not None:
            ctx.decline(entry.name, reason)
            continue
        if not ctx.edits.quantizes_weight(entry) and not hasattr(entry.param, "codes"):
            continue
        site = ctx.edits.quantize(entry, fan_in_fan_out=transposed == {True}, as_module=used_as_module(entry, linears))
        for linear in linears:
            _rewrite(linear, entry, site.info.compute_dtype, ctx)
        count += len(linears)
    return count


def decline_reason(entry: ParamInfo, transposed: set[bool], ctx: PassContext) -> str | None:
    """Why the weight stays as it is, or None. A weight with a site was decided on before."""
    if len(transposed) > 1:
        return "it is used both as W and as its transpose"
    if entry.site is not None:
        fits = transposed == {entry.site.fan_in_fan_out}
        return None if fits else "it was adapted in another graph that uses its transpose"
    return None if ctx.edits.is_held(entry) else ctx.edits.decline_reason(entry)


def linears_of(weight: fx.Node) -> list[fx.Node] | None:
    """The linears that this weight is the weight of (through transposes and casts); None if anything else uses it."""
    found: list[fx.Node] = []
    queue = list(weight.users)
    while queue:
        user = queue.pop(0)
        if is_linear(user) and peel_transposes(user.args[1])[0] is weight and user.args[0] is not weight:
            found.append(user)
        elif peel_transposes(user)[0] is weight or peel_casts(user) is weight:
            queue += user.users
        else:
            return None
    return found


def _has_linear(weight: fx.Node) -> bool:
    """Whether some linear has this weight: otherwise nobody expects it to be quantized."""
    queue = list(weight.users)
    while queue:
        user = queue.pop()
        if is_linear(user) and peel_transposes(user.args[1])[0] is weight:
            return True
        if peel_transposes(user)[0] is weight:
            queue += user.users
    return False


def used_as_module(entry: ParamInfo, linears: list[fx.Node]) -> bool:
    """Whether every use is the owner's own forward, so that the owner's class can be swapped."""
    owners = {name: module for name, module, key in entry.owners if key == "weight"}
    if len(owners) != len(entry.owners) or not all(is_linear_module(module) for module in owners.values()):
        return False
    return all(any(_is_within(linear, name) for name in owners) for linear in linears)


def _is_within(node: fx.Node, owner: str) -> bool:
    """Either name may be the longer one: the graph's starts at the traced frame's module, the owner's at the root."""
    path = module_path(node)
    return path == owner or path.endswith(f".{owner}") or bool(path and owner.endswith(f".{path}"))


def _rewrite(linear: fx.Node, entry: ParamInfo, dtype: torch.dtype, ctx: PassContext) -> None:
    weight: Any = entry.param
    parts = [_part(linear.graph, entry, part, ctx) for part in _PARTS]
    layout = weight.layout_4bit
    args = (*parts, list(layout.inner_shape), layout.quant_type, layout.block_size, dtype)
    dense = emit(linear, torch.ops.qlora.dequantize_4bit.default, args, linear)
    dense.meta["example_value"] = torch.empty(layout.inner_shape, dtype=dtype, device="meta")
    x, _, bias = linear.args
    given = dtype_of(x)
    linear.args = (cast(linear, x, dtype, linear), dense, bias if bias is None else cast(linear, bias, dtype, linear))
    linear.meta["qlora_sites"] = dense.meta["qlora_sites"] = (entry.name,)
    if given is not None and given != dtype:
        back = emit(linear.next, "to", (linear, given), linear, method=True)
        linear.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        back.meta["example_value"] = linear.meta.get("example_value")
        linear.meta["example_value"] = _retyped(linear.meta.get("example_value"), dtype)


def _retyped(example: Any, dtype: torch.dtype) -> Any:
    return example.to(dtype) if isinstance(example, torch.Tensor) else example


def _part(graph: fx.Graph, entry: ParamInfo, part: str, ctx: PassContext) -> fx.Node | None:
    """The placeholder of one inner tensor, or None where there is none (no double quantization)."""
    example = getattr(entry.param, part)
    if example is None:
        return None
    return ctx.add_state(graph, StateRef(f"{entry.name}.{part}", example, lambda: getattr(entry.param, part)))
