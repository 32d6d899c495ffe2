"""The linears of a model as a tree on the terminal: model → repeated block → linears, each with its columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from .stage_graph import human_bytes

if TYPE_CHECKING:
    from .kernel_report import KernelReport
    from .report import CompileReport, LinearReport

Blocks = list[tuple[str, list[tuple["LinearReport", int]]]]
_COLUMNS = ("out × in", "bits", "rank", "group", "kernel", "bytes")
_BRANCH, _LAST, _LINE, _SPACE = "├─ ", "└─ ", "│  ", "   "
_DENSE_BITS = 8  # from here on a weight is not quantized


def linear_tree(report: CompileReport) -> Table:
    """Equal layers as one block `layers.0…29 ×30`, whose rows are the linears of the first with the bytes of all."""
    table = Table(box=box.SIMPLE_HEAD, title="linears", title_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("module", no_wrap=True)
    for column in _COLUMNS:  # a narrow terminal breaks the names in the lines of two columns only
        wraps = column in ("group", "kernel")
        table.add_column(column, overflow="fold", no_wrap=not wraps, justify="right" if column[0] == "b" else "left")
    table.add_row(Text(report.model, "bold"), *_sums([(linear, 1) for linear in report.linears]))
    backward = _backward_kernels(report.choices)
    blocks = linear_blocks(report.linears)
    rows = [(block, members) for block, members in blocks if block]
    single = [(linear, times) for block, members in blocks if not block for linear, times in members]
    for position, (block, members) in enumerate(rows):
        last = position == len(rows) - 1 and not single
        table.add_row(_guided(_LAST if last else _BRANCH, block, "bold cyan"), *_sums(members))
        for linear, times in members:
            end = _LAST if linear is members[-1][0] else _BRANCH
            name = _guided((_SPACE if last else _LINE) + end, _within(linear.name), "")
            table.add_row(name, *_cells(linear, times, backward))
    for linear, times in single:
        end = _LAST if linear is single[-1][0] else _BRANCH
        table.add_row(_guided(end, linear.name, ""), *_cells(linear, times, backward))
    return table


def _guided(guide: str, name: str, style: str) -> Text:
    return Text.assemble((guide, "dim"), (name, style))


def _sums(members: Sequence[tuple[LinearReport, int]]) -> tuple[Any, ...]:
    """Bits a weight and bytes of several linears together."""
    weights = sum(math.prod(linear.shape) * times for linear, times in members)
    stored = sum(linear.bytes_after * times for linear, times in members)
    bits = Text(f"{8 * stored / max(weights, 1):.3f}", "bold")
    return "", bits, "", "", "", Text(human_bytes(stored), "bold")


def _cells(linear: LinearReport, times: int, backward: dict[str, str]) -> tuple[Any, ...]:
    rank = ", ".join(f"{n}: {r}" if n != "default" else str(r) for n, r in linear.rank.items()) or "-"
    group = " + ".join(name.rsplit(".", 1)[-1] for name in linear.group)
    kernel, back = linear.lowering, backward.get(linear.name, linear.lowering)
    bits = Text(f"{linear.bits:.3f}", "green" if linear.bits < _DENSE_BITS else "yellow")
    return (
        " × ".join(map(str, linear.shape)),
        bits,
        rank,
        Text(group, "blue") if group else "-",
        Text(kernel if back == kernel else f"{kernel}, backward {back}", "magenta"),
        human_bytes(linear.bytes_after * times),
    )


def _backward_kernels(choices: Sequence[KernelReport]) -> dict[str, str]:
    return {site: c.kernel for c in choices if c.op.endswith("_backward") for site in c.modules}


def linear_blocks(linears: Sequence[LinearReport]) -> Blocks:
    """[(`model.layers.0…29 ×30` or "", [(linear of the first of them, how many there are)])], in model order."""
    layers: dict[tuple[str, str], list[LinearReport]] = {}
    for linear in linears:
        layers.setdefault(_layer_of(linear.name), []).append(linear)
    same: dict[Any, list[tuple[str, str]]] = {}
    for layer, members in layers.items():
        kind = tuple((_within(m.name), m.shape, m.bits, tuple(m.rank.items()), m.lowering) for m in members)
        same.setdefault((layer[0], kind) if layer[1] else layer, []).append(layer)
    blocks = []
    for group in same.values():
        path, first = group[0]
        label = "" if len(group) == 1 else f"{path}.{first}…{group[-1][1]} ×{len(group)}"
        blocks.append((label, [(linear, len(group)) for linear in layers[group[0]]]))
    return blocks


def _layer_of(name: str) -> tuple[str, str]:
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit() and 0 < i < len(parts) - 1), None)
    return (name, "") if index is None else (".".join(parts[:index]), parts[index])


def _within(name: str) -> str:
    path, index = _layer_of(name)
    return name[len(path) + len(index) + 2 :] if index else name
