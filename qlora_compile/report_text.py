"""A report as text for a terminal: passes, linears by repeated block, memory, one stage, the difference of two stages."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from .errors import UnknownOptionError
from .kernel_report import print_kernels
from .linear_tree import linear_tree
from .page_plan import PageTimeline
from .pass_manager import NodeRecord, PassResult
from .stage_graph import block_name, fold_blocks, human_bytes, human_count, to_networkx

if TYPE_CHECKING:
    from .report import CompileReport

_PREFETCHES = 12  # shown of each timeline; all of them are in the HTML report and in --json


def print_report(report: CompileReport, console: Console) -> None:
    """Passes with counts and ms, linears by repeated block, bytes, and the peak of a step where it is known."""
    if report.passes:
        console.print(_pass_table(report))
    console.print(linear_tree(report))
    if report.choices:
        print_kernels(report.choices, console)
    for what, amount in report.memory.items():
        shown = f"{amount:,.3f}" if what.startswith("bits") else f"{amount / 1e6:,.1f} MB"
        console.print(f"{what.replace('_', ' ')}: {shown}")
    for timeline in report.paging:
        console.print(_paging_table(timeline))
    if report.plan is not None:
        _print_plan(report, console)


def _paging_table(timeline: PageTimeline) -> Table:
    """Each prefetch of a backward pass: what it follows, what of its copy the nodes until its need hide."""
    way = "step in backward" if timeline.step_in_backward else "step() after backward"
    table = Table(title=f"{timeline.optimizer}: {way}, estimated ms into the backward pass", title_justify="left")
    for column in ("prefetch", "bytes", "after", "begun", "needed", "copy", "hidden"):
        table.add_column(column, justify="left" if column in ("prefetch", "after") else "right")
    for move in timeline.prefetches[:_PREFETCHES]:
        first = move.parameters[0] + (f" and {len(move.parameters) - 1} more" if len(move.parameters) > 1 else "")
        times = (move.issued_ms, move.needed_ms, move.copy_ms, move.hidden_ms)
        table.add_row(first, human_bytes(move.bytes), move.after or "the start", *(f"{ms:.2f}" for ms in times))
    more = len(timeline.prefetches) - _PREFETCHES
    if more > 0:
        table.add_row(f"... and {more} more")
    budget = "no budget" if timeline.budget is None else f"of a budget of {human_bytes(timeline.budget)}"
    table.caption = f"at most {human_bytes(timeline.peak_bytes)} planned on the device, {budget}; the backward takes "
    table.caption += f"{timeline.backward_ms:.1f} ms; {timeline.gradients_in_pages} gradients lie in pages"
    return table


def _pass_table(report: CompileReport) -> Table:
    table = Table(title=f"{report.model}: passes", title_justify="left")
    for column in ("pass", "rewrites", "ms", "nodes", "declined"):
        table.add_column(column, justify="left" if column in ("pass", "declined") else "right")
    for p in report.passes:
        nodes = f"{p.nodes_before} → {p.nodes_after}"
        table.add_row(p.name, str(p.rewrites), f"{p.ms:.1f}", nodes, _declined_text(p))
    if report.repeats:
        lists = ", ".join(f"{len(r.kept)} of {r.total} layers of {r.path}" for r in report.repeats)
        table.caption = f"traced {lists}: the others are equal; ms are of the traced ones, counts of all"
    return table


def _declined_text(result: PassResult) -> str:
    lines = [f"skip {what}: {reason}" for what, reason in result.declined]
    return "\n".join(lines[:4] + ([f"... and {len(lines) - 4} more"] if len(lines) > 4 else []))


def _print_plan(report: CompileReport, console: Console) -> None:
    plan = report.plan
    assert plan is not None
    table = Table(title="one training step", title_justify="left")
    for column in ("phase", "FLOPs", "peak", "at", "made of"):
        table.add_column(column, overflow="fold")
    for phase in dict.fromkeys(event.phase for event in plan.events):
        peak = plan.peak(phase)
        event = plan.events[peak.event]
        made_of = ", ".join(f"{kind} {human_bytes(n)}" for kind, n in sorted(peak.by_kind.items(), key=lambda i: -i[1]))
        where = f"{event.target} ({event.module or 'model'})"
        table.add_row(phase, human_count(plan.flops(phase)), human_bytes(peak.bytes), where, made_of)
    console.print(table)


# --- stages ------------------------------------------------------------------------------------------------------


def select_modules(records: Sequence[NodeRecord], pattern: str | None) -> tuple[NodeRecord, ...]:
    """The nodes of the modules that a pattern names: a name, its beginning or end, or a shell pattern.

    Raises UnknownOptionError naming the nearest module where it names none.
    """
    if pattern is None:
        return tuple(records)
    found = tuple(r for r in records if any(names_module(pattern, name) for name in (r.module, *r.sites)))
    if not found:
        raise unknown_module(pattern, {r.module for r in records if r.module})
    return found


def unknown_module(pattern: str, modules: Iterable[str]) -> UnknownOptionError:
    """Names the nearest module or end of a module's name (`down_proj`); where none is near, the last parts of all."""
    parts = [name.split(".") for name in modules]
    ends = {".".join(each[i:]) for each in parts for i in range(len(each))}
    near = difflib.get_close_matches(pattern, sorted(ends), n=1, cutoff=0.5)
    return UnknownOptionError(pattern, near or {each[-1] for each in parts}, what="module")


def names_module(pattern: str, module: str) -> bool:
    """Whether a pattern is the module's name, its beginning, its end, a part between dots, or a shell pattern for it."""
    inside = module == pattern or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")
    return inside or fnmatch.fnmatch(module, pattern) or f".{pattern}." in module


def stage_tree(stage: str, records: Sequence[NodeRecord]) -> Tree:
    """Modules of a stage, equal layers folded, with their ops, FLOPs and bytes written."""
    folded = fold_blocks(to_networkx(stage, records))
    root = Tree(f"[bold]{stage}[/bold]: {sum(r.repeat for r in records)} nodes")
    for name, fields in folded.nodes(data=True):
        counts = ", ".join(f"{target} ×{n}" if n > 1 else target for target, n in fields["targets"].items())
        flops = f"  {human_count(fields['flops'])}FLOP" if fields["flops"] else ""
        branch = root.add(f"[cyan]{name}[/cyan]  {human_bytes(fields['bytes'])}{flops}", highlight=False)
        branch.add(f"[dim]{counts}[/dim]", highlight=False)
    return root


def stage_diff(a: Sequence[NodeRecord], b: Sequence[NodeRecord]) -> list[tuple[str, Counter[str], Counter[str]]]:
    """[(module, ops that went, ops that came)]: by module, layers of one list together, unchanged ones left out."""
    before, after = _by_module(a), _by_module(b)
    rows = []
    for module in dict.fromkeys((*before, *after)):
        old, new = before.get(module, Counter()), after.get(module, Counter())
        if old != new:
            rows.append((module, old - new, new - old))
    return rows


def _by_module(records: Iterable[NodeRecord]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for record in records:
        if record.op not in ("placeholder", "output"):
            name = block_name(record.module) or "(model)"
            found.setdefault(name, Counter())[record.target] += record.repeat
    return found


def print_diff(names: tuple[str, str], a: Sequence[NodeRecord], b: Sequence[NodeRecord], console: Console) -> None:
    """`module  - linear ×3  + qlora.lora_linear ×1`, one line a module."""
    table = Table(title=f"{names[0]} → {names[1]}", title_justify="left")
    for column in ("module", "went", "came"):
        table.add_column(column, overflow="fold")
    rows = stage_diff(a, b)
    for module, gone, came in rows:
        table.add_row(module, f"[red]{_counts('-', gone)}[/red]", f"[green]{_counts('+', came)}[/green]")
    console.print(table if rows else f"{names[0]} → {names[1]}: no difference")


def _counts(sign: str, ops: Counter[str]) -> str:
    return "\n".join(f"{sign} {target} ×{n}" for target, n in sorted(ops.items()))
