"""The experts of a mixture: whose each grouped op is, and which 3-D weights stay dense and why.

    qlora.grouped_lora_linear(x, offsets, codes, ...)   gets the name of the weight whose codes those are

Nothing else is rewritten. A `QLoRAExperts` calls the op in its own forward; the backend gives a plain model that class
before its graph is traced, since experts that run as a loop leave no product in a graph that could be matched.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..fx_utils import is_call, placeholders
from ..pass_manager import PassContext

_OP = torch.ops.qlora.grouped_lora_linear.default
_PRODUCTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback", "bmm", "baddbmm", "matmul", "einsum")


def match_experts(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of ops that were given their weight's name."""
    count = 0
    for node in gm.graph.nodes:
        if not is_call(node, _OP, _OP.overloadpacket) or "qlora_sites" in node.meta:
            continue
        node.target = _OP
        stored = node.args[2]
        entry = ctx.param(stored) or ctx.codes.get(stored.name)
        adapted = entry is not None and entry.site is not None
        node.meta["qlora_sites"] = (entry.name,) if entry is not None and adapted else ()
        count += adapted
    for weight in placeholders(gm.graph):
        entry = ctx.param(weight)
        if entry is not None and entry.site is None and entry.param.dim() == 3 and _multiplies(weight):
            reason = ctx.edits.decline_reason(entry)
            if reason is not None:
                ctx.decline(entry.name, reason)
    return count


def _multiplies(weight: fx.Node) -> bool:
    """Whether some batched product (or one matrix of it, `weight[expert]`) reads the weight."""
    queue = list(weight.users)
    while queue:
        user = queue.pop()
        if is_call(user, _OP, operator.getitem, operator.matmul):
            return True
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if name in _PRODUCTS:
            return True
        if name in ("transpose", "to", "permute", "getattr", "mT"):
            queue += user.users
    return False
