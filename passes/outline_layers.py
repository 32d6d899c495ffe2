"""Equal regions of the flat graph -> one subgraph, called once for each with that region's own inputs.

    norm(x, n0); attention(x, q0, ...); ...; norm(x, n29); attention(x, q29, ...)
        ->  region = norm(x, n); attention(x, q, ...)
            call_region(region, x, n0, q0, ...)[0]; ...; call_region(region, x, n29, q29, ...)[0]

AOTAutograd then traces, and Inductor compiles, one layer for all of them, forward and backward. The regions are found
by the calls alone (`repeats.py`), so each copy computes exactly what it did. A region that writes into its inputs, or
whose outputs share memory with them, stays as it was: a subgraph may do neither.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise, takewhile

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from ..config import QLoRAConfig
from ..fx_utils import module_path, value, written
from ..pass_manager import PassContext, record
from ..regions import CHAINED, call_region
from .repeats import Run, best_run, cuts, inputs_of, sequence, tokenize

_OP = torch.ops.qlora.lora_linear.default
_MIN_SAVED = 60  # nodes, about one layer of a decoder: the report leaves out what would save less
_WORTH_IT = 300  # nodes, some layers: "auto" leaves less, so that small graphs read as they were written
_TRIES = 8  # places to cut that are tried


def outline_layers(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Returns the number of regions replaced by calls."""
    wanted = ctx.config.outline_layers
    nodes = sequence(gm.graph)
    if wanted is False or not any(node.target is _OP for node in nodes):
        return 0
    tokens, stretches, found = tokenize(nodes), [(0, len(nodes))], list[tuple[int, list[list[fx.Node]]]]()
    while stretches:
        low, high = stretches.pop()
        run = best_run(tokens, low, high)
        if run is None:
            continue
        start, copies = _copies(run, nodes, ctx)
        stop = start + len(copies) * run.period if copies else run.stop
        stretches += [(low, start), (stop, high)]
        if copies and _wanted(copies, len(nodes), ctx):
            found.append((start, copies))
    for _, copies in sorted(found, key=lambda one: one[0]):
        _outline(gm, copies)
    return sum(len(copies) for _, copies in found)


def _wanted(copies: list[list[fx.Node]], total: int, ctx: PassContext) -> bool:
    """Whether the user asks for it, or "auto" finds that it pays: where it is left, the report says what it would save."""
    if ctx.config.outline_layers is True:
        return True
    saved = (len(copies) - 1) * len(copies[0])
    reason = flat_reason(saved, ctx.config)
    if reason is None:
        return True
    if saved >= _MIN_SAVED:
        said = f"{reason}; outline_layers=True would compile {saved} of {total} nodes no more"
        ctx.decline(_name(copies), f"{len(copies)} equal regions: {said}")
    return False


def flat_reason(saved: int, config: QLoRAConfig) -> str | None:
    """Why "auto" leaves regions in the graph that would save so many nodes, or None.

    Measured on SmolLM2-135M, 30 layers: the outlined step takes no longer and compiles in three quarters of the time
    (benchmarks/compile_time.py).
    """
    if config.lowering != "inductor":
        return f"lowering {config.lowering!r} compiles nothing"
    return None if saved >= _WORTH_IT else "little to save"


def _copies(run: Run, nodes: Sequence[fx.Node], ctx: PassContext) -> tuple[int, list[list[fx.Node]]]:
    """(where they start, the equal copies of the run's block), cut at the best place that is allowed.

    No copies, and the reason for the report, if there is none.
    """
    first_reason = None
    for start in cuts(run, nodes)[:_TRIES]:
        starts = range(start, run.stop - run.period + 1, run.period)
        start, copies = _alike(starts, [list(nodes[i : i + run.period]) for i in starts])
        reason = "they are connected in different ways" if len(copies) < 2 else _decline_reason(copies)
        if reason is None:
            return start, copies
        first_reason = first_reason or (_name(copies), f"{len(starts)} equal regions, but {reason}")
    if first_reason is not None and run.saved >= _MIN_SAVED:
        ctx.decline(*first_reason)
    return run.start, []


def _alike(starts: Sequence[int], copies: list[list[fx.Node]]) -> tuple[int, list[list[fx.Node]]]:
    """The longest stretch of copies whose nodes are connected alike inside, and where it starts."""
    wiring = [[_wiring(node, {n: i for i, n in enumerate(copy)}) for node in copy] for copy in copies]
    edges = [0, *(i for i in range(1, len(copies)) if wiring[i] != wiring[i - 1]), len(copies)]
    first, last = max(pairwise(edges), key=lambda edge: edge[1] - edge[0])
    return starts[first], copies[first:last]


def _wiring(node: fx.Node, index: dict[fx.Node, int]) -> list[int]:
    """For each input, which node of the region it is, or -1 where it comes from outside."""
    return [index.get(ref, -1) for ref in inputs_of(node)[1]]


def _decline_reason(copies: list[list[fx.Node]]) -> str | None:
    """Why these regions cannot be subgraphs: those may not write into an input, nor return memory of one."""
    outputs = _outputs(copies)
    for copy in copies:
        inputs = [value(node) for node in _inputs(copy)]
        if not all(isinstance(example, (torch.Tensor, int, torch.SymInt)) for example in inputs):
            return "an input of the region is no tensor"
        results = [value(copy[i]) for i in outputs]
        if not all(isinstance(example, torch.Tensor) for example in results):
            return "a result of the region is no tensor"
        outside = {_memory(example) for example in inputs if isinstance(example, torch.Tensor)}
        for node in copy:
            target = written(node)
            if target is not None and (value(target) is None or _memory(value(target)) in outside):
                return f"{node.name} writes into an input of the region"
        given = [_memory(example) for example in results]
        if len(set(given)) < len(given) or outside & set(given):
            return "a result of the region shares memory with an input or another result"
    return None


def _memory(example: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(example.untyped_storage())


def _inputs(copy: Sequence[fx.Node]) -> list[fx.Node]:
    """What the copy uses from outside, in order of use."""
    inside = set(copy)
    return list(dict.fromkeys(ref for node in copy for ref in inputs_of(node)[1] if ref not in inside))


def _outputs(copies: Sequence[Sequence[fx.Node]]) -> list[int]:
    """Positions of the nodes that anything outside uses, in any copy."""
    inside = [set(copy) for copy in copies]
    used = (i for copy, own in zip(copies, inside, strict=True) for i, node in enumerate(copy) if set(node.users) - own)
    return sorted(set(used))


def _outline(gm: fx.GraphModule, copies: list[list[fx.Node]]) -> None:
    """Make the subgraph from the first copy, and put a call of it in the place of each."""
    name = f"region_{sum(child.startswith('region_') for child, _ in gm.named_children())}"
    outputs = _outputs(copies)
    # an operand is what one use of an outer node is in each copy: the same weight's place, or the one mask of all
    uses = list(zip(*([ref for node in copy for ref in inputs_of(node)[1]] for copy in copies), strict=True))
    own = set(copies[0])
    operands = list(dict.fromkeys(refs for refs in uses if refs[0] not in own))
    subgraph = _subgraph(gm, copies[0], operands, uses, outputs)
    inside = {node for copy in copies for node in copy}
    subgraph.meta[CHAINED] = tuple(i for i, refs in enumerate(operands) if not inside.isdisjoint(refs))
    gm.add_submodule(name, subgraph)
    for which in reversed(range(len(copies))):  # the last first: its operands are nodes of the one before
        _replace(gm, name, copies[which], [refs[which] for refs in operands], outputs)


def _subgraph(
    gm: fx.GraphModule,
    copy: Sequence[fx.Node],
    operands: Sequence[tuple[fx.Node, ...]],
    uses: Sequence[tuple[fx.Node, ...]],
    outputs: Sequence[int],
) -> fx.GraphModule:
    """The region as a graph of its own; `uses` holds, for each input of each node in order, what it is in every copy."""
    graph = fx.Graph()
    given = {refs: graph.placeholder(f"operand_{index}") for index, refs in enumerate(operands)}
    for refs, placeholder in given.items():
        placeholder.meta["example_value"] = value(refs[0])
    new: dict[fx.Node, fx.Node] = {}
    use = iter(uses)
    for node in copy:
        # node_copy asks for the inputs in the order of inputs_of
        new[node] = graph.node_copy(node, lambda ref: new[ref] if (refs := next(use))[0] in new else given[refs])
    results = [new[copy[i]] for i in outputs]
    graph.output(tuple(results))
    for result in results:
        # Dynamo saw it before adapters were there: it may say that no gradient is needed, and autograd would believe it
        result.meta.pop("example_value", None)
    return fx.GraphModule(gm, graph)


def _replace(
    gm: fx.GraphModule, name: str, copy: list[fx.Node], operands: Sequence[fx.Node], outputs: Sequence[int]
) -> None:
    """One copy -> a call of the subgraph; what the copy did stays on the call for the report."""
    graph = gm.graph
    records = tuple(record(node) for node in copy)
    with graph.inserting_after(copy[-1]):
        subgraph = graph.get_attr(name)
    with graph.inserting_after(subgraph):
        call = graph.call_function(call_region, (subgraph, name, *operands))
    call.meta["qlora_inside"] = records
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in copy[-1].meta:
            call.meta[key] = copy[-1].meta[key]
    after = call
    for number, index in enumerate(outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, number))
        after.meta = dict(copy[index].meta)
        copy[index].replace_all_uses_with(after)
    for node in reversed(copy):
        graph.erase_node(node)


def _name(copies: Sequence[Sequence[fx.Node]]) -> str:
    """The modules that hold the first and the last copy, for the report."""
    ends = []
    for copy in (copies[0], copies[-1]):
        paths = [path.split(".") for node in copy if (path := module_path(node))]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        ends.append(".".join(parts[0] for parts in common) or copy[0].name)
    return f"{ends[0]} ... {ends[1]}"
