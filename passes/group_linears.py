"""lora_linear ops that share their input -> one op: q/k/v, gate/up.

    lora_linear(x, [Wq], ...), lora_linear(x, [Wk], ...), lora_linear(x, [Wv], ...)
        ->  lora_linear(x, [Wq, Wk, Wv], ...)[0], [1], [2]

All adapters' x Aᵀ become one product, and dx is one product over the concatenated rows, accumulated in fp32.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..fx_utils import emit, is_call, writes_between
from ..pass_manager import PassContext

_OP = torch.ops.qlora.lora_linear.default
_LISTS = range(1, 12)  # weight ... seed; 12 dropout; 13 out_features; 14.. quant_type, block_size, dtype


def group_linears(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of groups made."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_call(node, _OP):
            groups.setdefault(_key(node), []).append(node)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    count = 0
    for members in groups.values():
        reasons = {member: _decline_reason(member, members[0], order) for member in members[1:]}
        for member, reason in reasons.items():
            if reason is not None:
                ctx.decline(", ".join(member.meta.get("qlora_sites", ())), reason)
        members = [member for member in members if reasons.get(member) is None]
        if len(members) > 1:
            _merge(members)
            count += 1
    return count


def _key(node: fx.Node) -> Any:
    """What members must share: the input, and whatever the op has only one of."""
    args: tuple[Any, ...] = node.args
    has = tuple(bool(args[i]) for i in (2, 3, 5, 8, 11))  # absmax, absmax_scale, bias, scaling, seed
    adapted = bool(args[6])
    return args[0], has if adapted else has[:3], adapted, args[12], args[14], args[15], args[16]


def _decline_reason(node: fx.Node, first: fx.Node, order: dict[fx.Node, int]) -> str | None:
    """Why it cannot move up to the first member. Seeds move with their op; nothing else that comes after it may."""
    seeds = set(node.args[11])  # type: ignore[arg-type]
    if any(order[source] > order[first] for source in node.all_input_nodes if source not in seeds):
        return "an input of it is computed after the first member"
    if writes_between(first, node, _OP):
        return "something between it and the first member may write into their input"
    return None


def _merge(members: list[fx.Node]) -> None:
    first = members[0]
    for member in members[1:]:
        for seed in member.args[11]:  # type: ignore[union-attr]
            first.prepend(seed)
    merged: list[Any] = [first.args[0]]
    merged += [[item for member in members for item in member.args[i]] for i in _LISTS]  # type: ignore[union-attr]
    merged += [first.args[12], [n for member in members for n in member.args[13]], *first.args[14:]]  # type: ignore[union-attr]
    group = emit(first, _OP, tuple(merged), first)
    group.meta["qlora_sites"] = tuple(site for member in members for site in member.meta.get("qlora_sites", ()))
    for index, member in enumerate(members):
        for user in list(member.users):
            item = emit(first, operator.getitem, (group, index), member)
            item.meta["example_value"] = user.meta.get("example_value")
            user.replace_all_uses_with(item)
