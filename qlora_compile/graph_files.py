"""A stage's graph as a file: GraphML, DOT, JSON (node-link), and a drawing of the folded stage as SVG."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from typing import Any
from xml.sax.saxutils import escape

import networkx as nx

from .stage_graph import fold_blocks, human_bytes


def to_graphml(graph: nx.DiGraph) -> str:
    """GraphML (yEd, Gephi); lists become text, as the format has none."""
    plain = nx.DiGraph(name=graph.name)
    for name, fields in graph.nodes(data=True):
        plain.add_node(name, **{key: _scalar(value) for key, value in fields.items() if value is not None})
    plain.add_edges_from(graph.edges)
    out = io.BytesIO()
    nx.write_graphml(plain, out)
    return out.getvalue().decode()


def _scalar(value: Any) -> Any:
    if isinstance(value, (tuple, list, set, frozenset)):
        return ", ".join(map(str, sorted(value, key=str) if isinstance(value, (set, frozenset)) else value))
    return str(value) if isinstance(value, dict) else value


def to_json(graph: nx.DiGraph) -> str:
    """networkx's node-link JSON."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, default=_jsonable) + "\n"


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def to_dot(graph: nx.DiGraph) -> str:
    """Graphviz: one box a node with target, shape and module."""
    lines = [f"digraph {json.dumps(str(graph.name))} {{", "  node [shape=box, fontname=monospace];"]
    for name, fields in graph.nodes(data=True):
        label = "\\n".join(part.replace('"', "'") for part in _label(name, fields))
        lines.append(f'  {json.dumps(name)} [label="{label}"];')
    lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in graph.edges]
    return "\n".join([*lines, "}"]) + "\n"


def _label(name: str, fields: dict[str, Any]) -> list[str]:
    if "ops" in fields:
        return [name, f"{fields['ops']} ops, {human_bytes(fields['bytes'])}"]
    shape = " × ".join(map(str, fields["shape"])) if fields["shape"] else ""
    return [
        part for part in (fields["target"], f"{fields['dtype']} {shape}" if shape else "", fields["module"]) if part
    ]


_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y = 250, 40, 24, 26


def to_svg(graph: nx.DiGraph) -> str:
    """A drawing of the folded stage, one box a module in the order of data flow; needs no other program."""
    folded = graph if all("ops" in fields for _, fields in graph.nodes(data=True)) else fold_blocks(graph)
    place = {name: (column, row) for row, names in enumerate(_rows(folded)) for column, name in enumerate(names)}
    columns = max((column for column, _ in place.values()), default=0) + 1
    width = columns * (_BOX_WIDTH + _GAP_X) + _GAP_X
    height = (max((row for _, row in place.values()), default=0) + 1) * (_BOX_HEIGHT + _GAP_Y) + _GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" font-size="11">',
        f'<title>{escape(str(graph.name))}</title><rect width="100%" height="100%" fill="white"/>',
    ]
    for a, b in folded.edges:
        (xa, ya), (xb, yb) = _corner(place[a]), _corner(place[b])
        start, end = (xa + _BOX_WIDTH / 2, ya + _BOX_HEIGHT), (xb + _BOX_WIDTH / 2, yb)
        parts.append(f'<path d="M{start[0]} {start[1]}L{end[0]} {end[1]}" stroke="#9aa4b2" fill="none"/>')
    for name, fields in folded.nodes(data=True):
        x, y = _corner(place[name])
        lines = _label(name, fields)
        parts.append(
            f'<g><title>{escape(name)}</title><rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" '
            f'fill="{"#dbeafe" if fields["flops"] else "#f1f5f9"}" stroke="#64748b"/>'
            f'<text x="{x + 8}" y="{y + 16}">{escape(_shortened(lines[0]))}</text>'
            f'<text x="{x + 8}" y="{y + 31}" fill="#475569">{escape(lines[-1])}</text></g>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _shortened(text: str) -> str:
    return text if len(text) <= 36 else "…" + text[-35:]


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return _GAP_X + place[0] * (_BOX_WIDTH + _GAP_X), _GAP_Y + place[1] * (_BOX_HEIGHT + _GAP_Y)


def _rows(graph: nx.DiGraph) -> Iterable[list[str]]:
    """Layers of the drawing: generations of the graph, whose cycles (a folded layer feeds itself) count as one."""
    condensed = nx.condensation(graph)
    for generation in nx.topological_generations(condensed):
        members = [name for node in generation for name in condensed.nodes[node]["members"]]
        yield from _chunks(sorted(members, key=list(graph).index), 6)


def _chunks(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))


GRAPH_FORMATS: dict[str, Callable[[nx.DiGraph], str]] = {
    "graphml": to_graphml,
    "dot": to_dot,
    "json": to_json,
    "svg": to_svg,
}
