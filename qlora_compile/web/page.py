"""A report -> one HTML file that opens offline: template, style, script, libraries and data all inside it."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CppLexer, PythonLexer

from ..kernel_report import articles, places
from ..memory_plan import MemoryPlan
from ..page_plan import PageTimeline
from ..pass_manager import NodeRecord
from ..runtime.export_report import ExportReport, read_export_report
from ..runtime.formats.atomic import write_file
from ..runtime.metrics import read_metrics
from ..stage_graph import fold_blocks, folded_names, to_networkx

if TYPE_CHECKING:
    from ..report import CompileReport

POINTS = 1200  # of the memory chart: the peak of each interval is kept, so the chart's top is the plan's
_STACK = ("weights", "adapters", "trained", "optimizer", "gradients", "saved", "output", "workspace", "temporary")  # up
_TOP, _AT_PEAK = 4, 12  # largest buffers named at a point, and at the peak
_LIBRARIES = ("cytoscape.min.js", "cytoscape-dagre.min.js", "uPlot.iife.min.js")


RunLog = dict[str, list[dict[str, Any]]]


def write_page(
    report: CompileReport,
    path: Path | str,
    runs: Sequence[Path | str] = (),
    exports: Sequence[ExportReport | Path | str] = (),
) -> Path:
    """Write the report; `runs` are folders of `finetune`, for the page Training, `exports` reports of `export` or
    their JSON files, for the page Export. Raises OutputError, CheckpointError."""
    logs = {str(run): _run_log(Path(run)) for run in runs}
    done = [read_export_report(Path(e)) if isinstance(e, str | Path) else e for e in exports]
    return write_file(path, render(report, logs, done))


def render(report: CompileReport, runs: Mapping[str, RunLog], exports: Sequence[ExportReport] = ()) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_file("report.html.jinja"))
    kernels = [{"name": name, "html": Markup(_highlighted(text))} for name, text in report.kernels.items()]
    return template.render(
        report=report,
        exports=exports,
        style=Markup(_file("report.css") + _highlight_style() + _file("uPlot.min.css")),
        libraries=[Markup(_file(name)) for name in _LIBRARIES],
        licenses=_file("LICENSES.txt"),
        script=Markup(_file("paging.js") + _file("report.js").removeprefix('"use strict";')),
        data=Markup(_json(page_data(report, runs))),
        kernels=kernels,
        linear_of=_linears_by_lowering(report),
        article_of=articles(report),
        places=places,
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, default=str, separators=(",", ":")).replace("</", "<\\/")


def _highlighted(text: str) -> str:
    lexer = CppLexer() if "#include" in text else PythonLexer()
    return highlight(text, lexer, HtmlFormatter(cssclass="code", linenos=False))


def _highlight_style() -> str:
    light = HtmlFormatter(style="default", cssclass="code").get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark", cssclass="code").get_style_defs("[data-theme=dark] .code")
    return f"{light}\n{dark}\n"


def _linears_by_lowering(report: CompileReport) -> dict[str, int]:
    found: dict[str, int] = {}
    for linear in report.linears:
        found[linear.lowering] = found.get(linear.lowering, 0) + 1
    return found


_STEP_KEYS = ("step", "loss", "tokens_per_s", "memory_bytes", "grad_norm", "lr")
_PAGING_KEYS = ("paged_in_bytes", "paged_out_bytes", "stall_ms")


def _run_log(folder: Path) -> RunLog:
    """Steps and evaluations of a run; of an evaluation of the model being trained only."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [
        {key: line.get(key) for key in (*_STEP_KEYS, *_PAGING_KEYS)} for line in lines if line.get("event") == "step"
    ]
    evals = [line for line in lines if line.get("event") == "eval" and line["stage"] != "dense"]
    return {"steps": steps, "evals": [{key: line[key] for key in ("step", "stage", "perplexity")} for line in evals]}


# --- data --------------------------------------------------------------------------------------------------------


def page_data(report: CompileReport, runs: Mapping[str, RunLog]) -> dict[str, Any]:
    """What the script draws: folded graphs of every stage, the memory chart, the runs, numerics."""
    return {
        "stages": {name: stage_data(name, records) for name, records in report.stages.items()},
        "memory": memory_data(report.plan) if report.plan is not None else None,
        "paging": [paging_data(timeline, report.stages.get("backward", ())) for timeline in report.paging],
        "sizes": report.memory,
        "runs": runs,
        "numerics": [row.__dict__ for row in report.numerics],
        "formats": [row.__dict__ for row in report.formats],
        "perplexity_dense": report.perplexity_dense,
        "format": f"{report.config.quant_type}, blocks of {report.config.block_size}",
        "parts": {choice.kernel: list(choice.parts) for choice in report.choices},
        "articles": articles(report),
    }


def stage_data(stage: str, records: Sequence[NodeRecord]) -> dict[str, Any]:
    """The folded graph, each block with the ops of its first layer."""
    graph = to_networkx(stage, records)
    folded, names = fold_blocks(graph), folded_names(graph)
    first: dict[str, str] = {}
    members: dict[str, list[list[Any]]] = {name: [] for name in folded}
    for name, fields in graph.nodes(data=True):
        block = names[name]
        if block not in members or first.setdefault(block, fields["module"]) != fields["module"]:
            continue
        shape = "×".join(map(str, fields["shape"] or ()))
        made_by = " → ".join(fields["made_by"])
        row = [name, fields["target"], shape, fields["dtype"], fields["bytes"], fields["flops"], fields["kernel"]]
        members[block].append([*row, made_by, fields["source"], ", ".join(fields["sites"])])
    nodes = [
        {"id": name, "module": first.get(name, ""), "targets": data["targets"], "ops": data["ops"]}
        | {"bytes": data["bytes"], "flops": data["flops"], "members": members[name]}
        for name, data in folded.nodes(data=True)
    ]
    return {"nodes": nodes, "edges": [list(edge) for edge in folded.edges]}


def memory_data(plan: MemoryPlan) -> dict[str, Any]:
    """Live bytes by kind at up to POINTS events, the largest of each interval, with its largest buffers."""
    line = plan.timeline()
    step = max(1, -(-len(line) // POINTS))
    picked = [max(range(i, min(i + step, len(line))), key=lambda j: line[j]) for i in range(0, len(line), step)]
    kinds: dict[str, list[int]] = {kind: [amount] * len(picked) for kind, amount in plan.resident_bytes().items()}
    tops, ending, start = [], [], 0  # type: list[list[list[Any]]], list[tuple[int, int]], int
    by_start = sorted(range(len(plan.buffers)), key=lambda i: plan.buffers[i].start)
    live: set[int] = set()
    for point, event in enumerate(picked):
        while start < len(by_start) and plan.buffers[by_start[start]].start <= event:
            index = by_start[start]
            live.add(index)
            heapq.heappush(ending, (plan.buffers[index].end, index))
            start += 1
        while ending and ending[0][0] < event:
            live.discard(heapq.heappop(ending)[1])
        for index in live:
            buffer = plan.buffers[index]
            column = kinds.setdefault(buffer.kind, [0] * len(picked))
            column[point] += plan.size(buffer.size)
        largest = heapq.nlargest(_TOP, live, key=lambda i: plan.size(plan.buffers[i].size))
        tops.append([[b.name, b.module, plan.size(b.size)] for b in (plan.buffers[i] for i in largest)])
    kinds = {kind: kinds[kind] for kind in (*_STACK, *kinds) if kind in kinds}
    events = [[plan.events[i].phase, plan.events[i].target, plan.events[i].module] for i in picked]
    peak = plan.peak()
    alive: list[Any] = [[b.name, b.module, b.kind, plan.size(b.size)] for b in plan.live_at(peak.event)[:_AT_PEAK]]
    alive += [[f"{name}, reused", "all that need it", "workspace", plan.size(n)] for name, n in plan.scratch.items()]
    largest_then = sorted(alive, key=lambda row: -row[3])[:_AT_PEAK]
    return {"event": picked, "events": events, "kinds": kinds, "tops": tops, "peak": peak.bytes, "peak_event": peak.event,
            "by_kind": peak.by_kind, "at_peak": largest_then, "pages": _page_marks(plan)}  # fmt: skip


def _page_marks(plan: MemoryPlan) -> list[list[Any]]:
    """[event, "in" or "out", bytes, the first parameter, how many] for each prefetch and eviction."""
    found: dict[tuple[int, str], list[Any]] = {}
    for buffer in plan.buffers:
        if buffer.kind == "optimizer":
            for event, way in ((buffer.start, "in"), (buffer.end, "out")):
                if way == "in" or plan.events[event].target == "qlora.evict_page":
                    mark = found.setdefault((event, way), [event, way, 0, buffer.name.removeprefix("state of "), 0])
                    mark[2], mark[4] = mark[2] + plan.size(buffer.size), mark[4] + 1
    return [found[key] for key in sorted(found)]


def paging_data(timeline: PageTimeline, backward: Sequence[NodeRecord]) -> dict[str, Any]:
    """What a paged optimizer does over a backward pass; of a prefetch the first parameter and how many there are."""
    modules = {record.name: record.module for record in backward}
    moves = []
    for move in timeline.prefetches:
        fields = {name: value for name, value in asdict(move).items() if name != "parameters"}
        first, count = move.parameters[0], len(move.parameters)
        moves.append(fields | {"first": first, "count": count, "module": modules.get(move.after, "")})
    return timeline.to_dict() | {"prefetches": moves}
