"""Which kernel runs each op, and why: what `lower_kernels`, `lower_attention` and `widen_matmuls` found."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from .fx_utils import module_path

if TYPE_CHECKING:
    from .report import CompileReport


@dataclass
class KernelReport:
    """One op at one size: the kernel that was chosen, why, the generated parts it calls (keys of `report.kernels`), the
    modules that use it, and the source files of each part: on a GPU one for each form in which it was launched, none
    before."""

    op: str
    sizes: str
    kernel: str
    why: str
    parts: tuple[str, ...]
    device: str
    modules: tuple[str, ...] = ()
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)


def kernel_reports(gm: fx.GraphModule) -> list[KernelReport]:
    """The choices on the graph's nodes, equal ones joined, in the graph's order; `with_sources` adds the files, since a
    GPU's kernels are generated when they first run."""
    from .runtime.kernels import dispatch

    found: dict[tuple[str, str, str], KernelReport] = {}
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]  # outlined regions among them
    for node in [node for part in parts for node in part.graph.nodes if node.target is not operator.getitem]:
        where = node.meta.get("qlora_sites") or (module_path(node) or node.name,)
        for op, choice in node.meta.get("qlora_kernels", ()):
            key = (op, str(choice.problem), choice.name)
            if key not in found:
                device = choice.problem.device
                found[key] = KernelReport(*key, choice.why, dispatch.generated(choice.candidate, device), device)
            found[key].modules += tuple(where)
    return list(found.values())


def with_sources(reports: Sequence[KernelReport], *, of_others: bool = False) -> list[KernelReport]:
    """The reports with the source files that there are by now (`of_others`: see `kernels.source_files`)."""
    from .runtime.kernels import source_files

    def files(part: str, device: str) -> tuple[str, ...]:
        return tuple(map(str, source_files(part, device, of_others=of_others)))

    return [replace(r, sources={p: f for p in r.parts if (f := files(p, r.device))}) for r in reports]


def articles(report: CompileReport) -> dict[str, str]:
    """Each generated part -> the key of `report.kernels` under which its source stands: several kernels share one file."""
    from .runtime.kernels import source_name

    by_file = {source_name(op, report.device): op for op in report.kernels}
    parts = dict.fromkeys(part for choice in report.choices for part in choice.parts)
    file_of = {part: source_name(part, report.device) for part in parts}
    return {part: by_file[file] for part, file in file_of.items() if file in by_file}


def print_kernels(reports: list[KernelReport], console: Any) -> None:
    """A table of the choices, then the source files."""
    from rich.table import Table

    table = Table(title="kernels", title_justify="left")
    for column in ("op", "sizes", "kernel", "why", "modules"):
        table.add_column(column, overflow="fold", justify="left")
    for r in reports:
        table.add_row(r.op, r.sizes, f"{r.kernel}\n[dim]{' + '.join(r.parts)}[/dim]", r.why, places(r.modules))
    console.print(table)
    found = {part: paths for r in reports for part, paths in r.sources.items()}
    for part, path in [(part, path) for part, paths in found.items() for path in paths]:
        console.print(f"source of {part}: {path}", soft_wrap=True, highlight=False)


def places(modules: Sequence[str]) -> str:
    """`*.mlp.gate_proj ×30, *.mlp.up_proj ×30`: modules of equal layers together."""
    counts = Counter(re.sub(r"^.*\.\d+(?=\.)", "*", module) for module in modules)
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in counts.items())
