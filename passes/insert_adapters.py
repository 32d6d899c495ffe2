"""linear(x, W) -> linear(x, W) + linear(linear(dropout(x), A), B) * alpha * weight, for each target without adapters.

The adapters are made on the model by the state edits; a linear whose module has them already was traced with them.
"""

from __future__ import annotations

from torch import fx

from ..fx_utils import dtype_of, is_linear, peel_transposes
from ..modules import QLoRALinear
from ..param_info import ParamInfo, StateRef
from ..pass_manager import PassContext
from .lora_pattern import write_branch
from .quantize_weights import decline_reason, linears_of, used_as_module


def insert_adapters(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of linears that got a branch; linears that share a weight share its adapter."""
    by_name = {entry.name: entry for entry in ctx.params.values()}
    had_adapters = {entry.name for entry in by_name.values() if entry.site is not None and entry.site.adapters}
    count = 0
    for node in list(gm.graph.nodes):
        if not is_linear(node):
            continue
        entry = _target(node, by_name, ctx)
        if entry is None or entry.site is None or entry.name in had_adapters or not ctx.edits.selects(entry):
            continue
        ctx.edits.add_adapter(entry.site)
        count += _insert(node, entry, ctx)
    return count


def _target(node: fx.Node, by_name: dict[str, ParamInfo], ctx: PassContext) -> ParamInfo | None:
    """The entry of the linear's weight: quantized by the pass before, or a target that stays dense."""
    if ctx.edits.is_foreign:
        return None  # it has the adapters that PEFT gave it
    for name in node.meta.get("qlora_sites", ()):
        return by_name[name]
    weight, odd = peel_transposes(node.args[1])
    entry = ctx.param(weight)
    if entry is None or ctx.edits.quantizes_weight(entry):
        return None
    linears = linears_of(weight)
    if not linears:
        return None
    reason = decline_reason(entry, {peel_transposes(linear.args[1])[1] for linear in linears}, ctx)
    if reason is None and not used_as_module(entry, linears) and entry.site is None:
        reason = "its weight is dense and another module's code uses it"
    if reason is not None:
        ctx.decline(entry.name, reason)
        return None
    ctx.edits.quantize(entry, fan_in_fan_out=odd, as_module=True)  # attaches only: it stays dense
    node.meta["qlora_sites"] = (entry.name,)
    return entry


def _insert(node: fx.Node, entry: ParamInfo, ctx: PassContext) -> int:
    site = entry.site
    if site is None or not site.adapters:
        return 0
    graph, name = node.graph, f"{site.name}.lora"
    a = ctx.add_state(graph, StateRef(f"{name}_A", site.a(), lambda: site.a()))
    b = ctx.add_state(graph, StateRef(f"{name}_B", site.b(), lambda: site.b()))
    weight = ctx.add_state(graph, StateRef(f"{name}_weight", site.adapter_weight(), lambda: site.adapter_weight()))
    x = node.args[0]
    # a parameter that another module's code uses has no dropout: eager code adds its adapters to the weight, not beside it
    dropout = site.info.dropout if site.module.training and isinstance(site.module, QLoRALinear) else 0.0
    write_branch(node, x, a, b, (site.scaling(), weight), dropout, dtype_of(x) or site.info.compute_dtype)
    return 1
