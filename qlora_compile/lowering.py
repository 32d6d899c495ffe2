"""A rewritten graph -> code: Inductor or AOTAutograd compiles it, and a callable hands it the state on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import fingerprint
from .config import QLoRAConfig
from .flops import partitioner_settings
from .fx_utils import placeholders, recomputed
from .linear_cross_entropy import with_gradient
from .param_info import StateRef
from .pass_manager import PassContext
from .regions import CACHEABLE, call_region, return_operands_directly
from .tensor import QuantizedTensor

if TYPE_CHECKING:
    from .backward_edit import BackwardEdit

Lowering = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def bind(
    work: fx.GraphModule,
    example_inputs: list[Any],
    position: dict[str, int],
    stored: dict[str, int],
    ctx: PassContext,
    lower: Lowering,
) -> Callable[..., Any]:
    """Drop dead inputs, compile, and return the callable that hands the state on the model to the compiled graph.

    `stored`: where among the arguments the 4-bit weights are that were there before. Their codes are taken from the
    argument at each call, because a graph of one layer (after a graph break) serves other layers like it.
    """
    kept: list[int] = []
    refs: list[StateRef] = []
    for node in placeholders(work.graph):
        if not node.users and isinstance(_example(node), torch.Tensor):
            work.graph.erase_node(node)
        elif node.name in ctx.state:
            refs.append(ctx.state[node.name])
        else:
            kept.append(position[node.name])
    # an attribute, since AOTAutograd's key reads no `meta`: neither the nodes' nor the graph's own
    work.qlora_cache_key = (fingerprint.sources(), recomputed(work))
    work.recompile()
    inputs = [example_inputs[i] for i in kept] + [ref.get() for ref in refs]
    fetch = [_fetcher(ref, stored) for ref in refs]
    del example_inputs[:]  # the list must not keep the dense weights alive in this frame
    inner = lower(work, inputs)
    del inputs

    def call(*args: Any) -> Any:
        return inner(*[args[i] for i in kept], *[get(args) for get in fetch])

    heads = [(kept, position[kept.head]) for kept in ctx.kept_logits]

    def call_with_logits(*args: Any) -> Any:
        *outs, hidden = call(*args)
        for kept, head in heads:
            outs[kept.output] = with_gradient(hidden, outs[kept.output], args[head], kept.scale, kept.soft_cap)
        return outs

    return call_with_logits if heads else call


def _fetcher(ref: StateRef, stored: Mapping[str, int]) -> Callable[[tuple[Any, ...]], Any]:
    """How a call finds this tensor: in the 4-bit weight that it was given, else on the module that was traced."""
    site, _, part = ref.name.rpartition(".")
    if part not in QuantizedTensor.__annotations__ or site not in stored:
        return lambda args: ref.get()
    index = stored[site]
    return lambda args: getattr(args[index], part)


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def lowering(config: QLoRAConfig, backward: Callable[[], BackwardEdit | None] = lambda: None) -> Lowering:
    """Inductor, AOTAutograd alone, or the graph as it is; the activation budget holds for the partitioner.

    `backward()` gives what edits the backward graph, or None; what it does is in AOTAutograd's key.
    """

    def lower(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        settings = partitioner_settings(config.activation_budget)
        edit = backward()
        if edit is not None:
            gm.qlora_cache_key = (*gm.qlora_cache_key, edit.key)
            if config.dump_dir is not None:
                settings["enable_autograd_cache"] = False  # a graph that is served is not there to be written down
        if any(node.target in (call_region, torch.ops.higher_order.invoke_subgraph) for node in gm.graph.nodes):
            # Inductor takes the outer graph's list of inputs that may be overwritten for the subgraph's (torch 2.13,
            # pytorch#192840), whose backward then destroys what another layer still needs
            settings["donated_buffer"] = False
        with torch._functorch.config.patch(settings) if settings else contextlib.nullcontext():
            if config.lowering == "inductor" and not _gives_inputs_other_data(gm):
                if edit is not None:
                    edit.expect(gm)
                from torch._inductor.compile_fx import compile_fx, compile_fx_inner

                def inner(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
                    return_operands_directly(gm)
                    if edit is not None and kwargs.get("is_backward"):
                        edit(gm)
                    return compile_fx_inner(gm, inputs, **kwargs)

                known = torch._inductor.config.unsafe_marked_cacheable_functions
                with torch._inductor.config.patch(unsafe_marked_cacheable_functions=known | CACHEABLE):
                    return compile_fx(gm, inputs, inner_compile=inner)
            if config.lowering != "eager":
                from torch._dynamo.backends.debugging import aot_eager, boxed_nop

                def backward_compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
                    if edit is not None:
                        edit(gm)
                    return boxed_nop(gm, inputs)

                return aot_eager(gm, inputs, bw_compiler=backward_compiler)
            return gm.forward

    return lower


def _gives_inputs_other_data(gm: fx.GraphModule) -> bool:
    """Whether the call itself replaces an input's data, as bitsandbytes does once for each layer on a CPU with AVX-512
    BF16 that evaluates. Such a graph runs once, and Inductor (torch 2.13) expects the input in its later shape.
    """
    inputs = set(placeholders(gm.graph))
    return any(node.target is torch.Tensor.set_ and node.args[0] in inputs for node in gm.graph.nodes)
