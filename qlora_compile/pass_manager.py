"""The pass manager: runs named passes in order and alone does the chores around each of them.

For every pass: snapshot before and after, count, time, dead-code elimination, lint, provenance of new nodes,
and an error that names the pass. A pass itself is `def name(gm: fx.GraphModule, ctx: PassContext) -> int`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from .config import QLoRAConfig
from .errors import ConfigError, PassError, QLoRACompileError, UnknownOptionError
from .flops import node_flops
from .fx_utils import add_placeholder, any_value, called_graph, module_path, source_line
from .interruption import check
from .page_plan import PageLink, PageTimeline
from .param_info import ParamInfo, StateRef
from .state import ModelEdits

Pass = Callable[[fx.GraphModule, "PassContext"], int]


class KeptLogits(NamedTuple):
    """Logits that the graph returns and autograd does not see: soft_cap tanh(scale z / soft_cap), or scale z without a cap,
    of what a frozen head made of the graph's last output."""

    output: int  # their position among the graph's outputs
    head: str  # the placeholder of the head's weight
    scale: float
    soft_cap: float


@dataclass
class PassContext:
    """What a pass may use: the configuration, the state edits, and a place to say why a rewrite was declined."""

    config: QLoRAConfig
    edits: ModelEdits
    params: dict[str, ParamInfo] = field(default_factory=dict)  # placeholder name -> the parameter that it stands for
    codes: dict[str, ParamInfo] = field(default_factory=dict)  # ... -> the 4-bit parameter whose codes it stands for
    state: dict[str, StateRef] = field(default_factory=dict)  # placeholder name -> state that a pass added
    added: dict[str, fx.Node] = field(default_factory=dict)  # name of such state -> its placeholder
    declined: list[tuple[str, str]] = field(default_factory=list)
    chooser: Callable[..., Any] | None = None  # (op, forced kernel or "", sizes...) -> the runtime's choice of a kernel
    pages: tuple[PageLink, ...] = ()  # paged optimizers with parameters of this graph
    timelines: list[PageTimeline] = field(default_factory=list)  # what was planned for them
    kept_logits: tuple[KeptLogits, ...] = ()
    phase: str = ""  # "backward": a graph of AOTAutograd's
    graph_number: int = 0  # how many graphs of this model were compiled before: names the dump's folder
    code: dict[tuple[int, int, str], str] | None = None  # (graph, stage, its name) -> its code, where it is kept

    def param(self, node: Any) -> ParamInfo | None:
        """The parameter that a placeholder stands for, or None."""
        return self.params.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def add_state(self, graph: fx.Graph, ref: StateRef) -> fx.Node:
        """A placeholder for a tensor that lives on the model; one per tensor, however often it is asked for."""
        node = self.added.get(ref.name)
        if node is None:
            node = self.added[ref.name] = add_placeholder(graph, ref.name, ref.example)
            self.state[node.name] = ref
        return node

    def choose(self, op: str, **sizes: Any) -> Any:
        """The kernel that runs `op` at these sizes (`.name`, `.why`), or None where no runtime stands behind."""
        return self.chooser(op, self.config.kernels.get(op, ""), **sizes) if self.chooser is not None else None

    def decline(self, what: str, reason: str) -> None:
        """Record `skip {what}: {reason}` for the report."""
        self.declined.append((what, reason))


@dataclass(frozen=True)
class NodeRecord:
    """One node as a report needs it; holds no tensor and no graph."""

    name: str
    op: str
    target: str
    inputs: tuple[str, ...]
    module: str
    source: str
    shape: tuple[Any, ...] | None
    dtype: str | None
    sites: tuple[str, ...]
    made_by: tuple[str, ...]
    kernels: tuple[tuple[str, str], ...] = ()
    flops: int = 0
    repeat: int = 1  # how many nodes of the whole model it stands for, where only some of its equal layers were traced


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    name: str
    rewrites: int
    ms: float
    declined: tuple[tuple[str, str], ...]
    nodes_before: int
    nodes_after: int


@dataclass
class PipelineResult:
    """Every pass's result, and the graph at each stage: "input", then after each pass by its name."""

    passes: list[PassResult]
    stages: dict[str, tuple[NodeRecord, ...]]


def insert_pass(
    pipeline: Sequence[Pass], new: Pass, *, before: str | None = None, after: str | None = None
) -> tuple[Pass, ...]:
    """The pipeline with `new` before or after the pass of that name. Raises UnknownOptionError for an unknown name."""
    anchor = before or after
    names = [p.__name__ for p in pipeline]
    if (before is None) == (after is None):
        raise ConfigError("insert_pass needs one place: the name of a pass as either before or after.")
    if anchor not in names:
        raise UnknownOptionError(str(anchor), names, what="pass")
    index = names.index(anchor) + (after is not None)
    return (*pipeline[:index], new, *pipeline[index:])


def run_passes(gm: fx.GraphModule, ctx: PassContext, pipeline: Sequence[Pass]) -> PipelineResult:
    """Run the passes in order, in place. Raises PassError naming the pass if one fails unexpectedly."""
    # The user's own calls without users are there for what they write: `F.relu(h, inplace=True)`, `out=`, `h += 1`.
    keep = {node for node in gm.graph.nodes if not node.users}
    result = PipelineResult([], {"input": snapshot(gm.graph)})
    _dump(ctx, 0, "input", gm)
    for number, run in enumerate(pipeline, start=1):
        check()
        name, before, size_before = run.__name__, set(gm.graph.nodes), _size(gm)
        ctx.declined = []
        start = time.perf_counter()
        try:
            rewrites = run(gm, ctx)
            _stamp(gm.graph, before, name)
            _eliminate_dead_code(gm.graph, keep)
            gm.graph.lint()
        except QLoRACompileError:
            raise
        except Exception as error:  # re-raised with the pass's name: the original is the cause
            # a lint error holds the whole graph: its first line says what is wrong
            summary = next(iter(str(error).splitlines()), "")
            raise PassError(f"Pass {name!r} failed: {type(error).__name__}: {summary}") from error
        ms = (time.perf_counter() - start) * 1e3
        unchanged = rewrites == 0 and before == set(
            gm.graph.nodes
        )  # records of a large graph take longer than most passes
        result.stages[name] = next(reversed(result.stages.values())) if unchanged else snapshot(gm.graph)
        result.passes.append(PassResult(name, rewrites, ms, tuple(ctx.declined), size_before, _size(gm)))
        _dump(ctx, number, name, gm)
    gm.recompile()  # once: no pass runs the graph's code
    return result


def _stamp(graph: fx.Graph, before: set[fx.Node], name: str) -> None:
    """New nodes get the pass's name added to where they come from."""
    for node in graph.nodes:
        if node not in before:
            node.meta["qlora_made_by"] = (*node.meta.get("qlora_made_by", ()), name)


def _eliminate_dead_code(graph: fx.Graph, keep: set[fx.Node]) -> None:
    """Drop pure calls that a pass left without users. Placeholders stay: the backend drops them with their argument."""
    for node in reversed(list(graph.nodes)):
        pure = node.op in ("call_function", "call_method", "get_attr") and not node.users and not node.is_impure()
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        if pure and not in_place and node not in keep:
            graph.erase_node(node)


def snapshot(graph: fx.Graph) -> tuple[NodeRecord, ...]:
    """The graph as records: plain values, safe to keep. A call of an outlined region is followed by what it does."""
    records = []
    for node in graph.nodes:
        records += [record(node), *node.meta.get("qlora_inside", ())]
    return tuple(records)


def _size(gm: fx.GraphModule) -> int:
    """Nodes to compile: those of the graph and, once each, of its subgraphs."""
    return sum(len(module.graph.nodes) for module in gm.modules() if isinstance(module, fx.GraphModule))


def record(node: fx.Node) -> NodeRecord:
    """One node as plain values."""
    example = any_value(node)
    is_tensor = isinstance(example, torch.Tensor)
    return NodeRecord(
        name=node.name,
        op=node.op,
        target=target_name(node),
        inputs=tuple(n.name for n in node.all_input_nodes),
        module=module_path(node),
        source=source_line(node),
        shape=tuple(s if isinstance(s, int) else str(s) for s in example.shape) if is_tensor else None,
        dtype=str(example.dtype).removeprefix("torch.") if is_tensor else None,
        sites=tuple(node.meta.get("qlora_sites", ())),
        made_by=tuple(node.meta.get("qlora_made_by", ())),
        kernels=tuple((op, choice.name) for op, choice in node.meta.get("qlora_kernels", ())),
        flops=0 if called_graph(node) else node_flops(node),  # what a region does is recorded after its call
    )


def target_name(node: fx.Node) -> str:
    """`aten.mm`, `torch._C._nn.linear` -> a short readable name."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def _dump(ctx: PassContext, number: int, name: str, gm: fx.GraphModule) -> None:
    """`dump_dir/graph_GG/NN_name.py`: the graph as Python, with shapes where they are known; a folder for each graph.

    Also into `ctx.code`.
    """
    if ctx.config.dump_dir is None and ctx.code is None:
        return
    text = gm.print_readable(print_output=False)
    if ctx.code is not None:
        ctx.code[ctx.graph_number, number, name] = text
    if ctx.config.dump_dir is None:
        return
    folder = Path(ctx.config.dump_dir) / "_".join(filter(None, (f"graph_{ctx.graph_number:02d}", ctx.phase)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:02d}_{name}.py").write_text(text, encoding="utf-8")
