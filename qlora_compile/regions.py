"""`call_region`: what an outlined graph calls for each of its equal regions.

Running for real it calls the subgraph. Traced by AOTAutograd it becomes `torch.ops.higher_order.invoke_subgraph`, which
traces, partitions and lowers a subgraph once for all calls of one identifier, forward and backward. torch looks at
nothing but the identifier, so it must name everything that a trace depends on: a subgraph traced for an input that needs
no gradient would silently give none to the next caller, and one lowered for other strides would read the wrong elements.
Two more faults of torch 2.13 are kept out: `return_operands_directly` here, and `donated_buffer` in the backend.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

# AOTAutograd's cache keeps no graph with a function that it does not know: this one is safe, its arguments say it all.
CACHEABLE = {"qlora_compile.regions.call_region": "1"}
CHAINED = "qlora_chained"  # in a subgraph's meta: positions of the operands that come from the region before it


def call_region(subgraph: fx.GraphModule, name: str, *operands: Any) -> tuple[Tensor, ...]:
    """`subgraph(*operands)`, compiled once for all calls with this name and operands of the same kind."""
    if detect_fake_mode(operands) is None:
        return tuple(subgraph(*operands))
    operands = _like_the_others(subgraph.meta.get(CHAINED, ()), operands)
    return tuple(torch.ops.higher_order.invoke_subgraph(subgraph, f"{name}_{_kind(operands)}", *operands))


def _like_the_others(chained: tuple[int, ...], operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first of equal layers gets an x that needs no gradient, if the embedding is frozen; x of the others does,
    where anything trains. Then the first one's does too, for one trace of all: that gradient ends here, unused, and
    costs a product or two in one layer; a second trace costs a second compilation of the layer."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return operands
    alike = list(operands)
    for index in chained:
        operand = operands[index]
        if isinstance(operand, Tensor) and operand.is_floating_point() and not operand.requires_grad:
            alike[index] = operand.detach().requires_grad_()
    return tuple(alike)


def return_operands_directly(gm: fx.GraphModule) -> None:
    """invoke_subgraph(..., x)[i], where that result is x itself -> x.

    AOTAutograd lets a region return the operands that its backward needs. Inductor (torch 2.13) takes such a result for
    memory of its own, and overwrites x after its last use elsewhere: the backward then reads something else.
    """
    invoke = torch.ops.higher_order.invoke_subgraph
    for call in gm.graph.find_nodes(op="call_function", target=invoke):
        subgraph = getattr(gm, str(call.args[0].target))
        operands = dict(zip(subgraph.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
        (output,) = subgraph.graph.find_nodes(op="output")
        for item in list(call.users):
            operand = operands.get(output.args[0][item.args[1]])
            if operand is not None:
                item.replace_all_uses_with(operand)
                gm.graph.erase_node(item)
    gm.recompile()


def _kind(operands: tuple[Any, ...]) -> str:
    """What tracing can see of the operands, and the modes around the call, as a short digest; equal in every process."""
    first: dict[int, int] = {}
    facts: list[Any] = [torch.is_grad_enabled()]
    devices = sorted({operand.device.type for operand in operands if isinstance(operand, Tensor)})
    facts += [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    for index, operand in enumerate(operands):
        if isinstance(operand, Tensor):
            same = first.setdefault(id(operand), index)  # one tensor given twice is traced as one
            layout = (str(tuple(operand.shape)), str(operand.stride()), operand.dtype, operand.device)
            facts.append((*layout, operand.requires_grad, same))
        else:
            facts.append(str(operand))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
