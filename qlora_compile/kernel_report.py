"""Which kernel runs each op, and why: what `lower_kernels`, `lower_attention` and `widen_matmuls` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .fx_utils import module_path


@dataclass
class KernelReport:
    """One op at one size: the kernel that was chosen, why, the generated parts it calls (keys of `report.kernels`)
    with their source files, and the modules that use it."""

    op: str
    sizes: str
    kernel: str
    why: str
    parts: tuple[str, ...]
    sources: tuple[str, ...]
    modules: tuple[str, ...]


def kernel_reports(gm: fx.GraphModule) -> list[KernelReport]:
    """The choices on the graph's nodes, equal ones joined, in the graph's order."""
    from .runtime.kernels import dispatch

    found: dict[tuple[str, str, str], KernelReport] = {}
    parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]  # outlined regions among them
    for node in [node for part in parts for node in part.graph.nodes]:
        where = node.meta.get("qlora_sites") or (module_path(node) or node.name,)
        for op, choice in node.meta.get("qlora_kernels", ()):
            key = (op, str(choice.problem), choice.name)
            if key not in found:
                sources = dispatch.sources(choice.candidate, choice.problem.device)
                paths = tuple(dict.fromkeys(map(str, sources.values())))
                found[key] = KernelReport(*key, choice.why, tuple(sources), paths, ())
            found[key].modules += tuple(where)
    return list(found.values())


def print_kernels(reports: list[KernelReport], console: Any) -> None:
    """A table of the choices, then the source files."""
    from rich.table import Table

    table = Table(title="kernels", title_justify="left")
    for column in ("op", "sizes", "kernel", "why", "modules"):
        table.add_column(column, overflow="fold", justify="left")
    for r in reports:
        more = f" and {len(r.modules) - 1} more" if len(r.modules) > 1 else ""
        table.add_row(r.op, r.sizes, r.kernel, r.why, r.modules[0] + more)
    console.print(table)
    for path in dict.fromkeys(source for r in reports for source in r.sources):
        console.print(f"source: {path}", soft_wrap=True)
