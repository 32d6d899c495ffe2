"""A stage of a report as a graph: attributes, repeated blocks, critical path, live ranges; and its file formats.

Nodes carry op, target, module, source, shape, dtype, bytes, flops, repeat, made_by, sites and kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import networkx as nx

from .pass_manager import NodeRecord

_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "aten.mm", "aten.bmm", "aten.addmm")


def to_networkx(stage: str, records: Sequence[NodeRecord]) -> nx.DiGraph:
    """The records of a stage as a `networkx.DiGraph`; edges are data flow."""
    graph = nx.DiGraph(name=stage)
    known = {record.name for record in records}
    for record in records:
        fields = dict(record.__dict__)
        inputs = fields.pop("inputs")
        fields |= {"bytes": tensor_bytes(record), "kernel": kernel(record)}
        graph.add_node(record.name, **fields)
        graph.add_edges_from((source, record.name) for source in inputs if source in known)
    return graph


def tensor_bytes(record: NodeRecord) -> int:
    """Bytes of the node's value (0 where it is no tensor, or a size is symbolic)."""
    if record.shape is None or not all(isinstance(n, int) for n in record.shape):
        return 0
    return math.prod(record.shape) * _ITEM_BYTES.get(record.dtype or "", 1)


def kernel(record: NodeRecord) -> str:
    """What runs the node: the kernel that was chosen for it, the library's product, or nothing of its own."""
    if record.kernels:
        forward = dict(record.kernels).get("lora_linear")
        backward = dict(record.kernels).get("lora_linear_backward")
        if forward and backward:
            return f"{forward}, backward {backward}"
        return ", ".join(name for _, name in record.kernels)
    if record.target == "qlora.dequantize_4bit":
        return "dequantize_4bit"
    if "scaled_dot_product" in record.target or record.target.startswith("qlora.attention"):
        return "attention"
    return "GEMM" if record.target in _PRODUCTS else ""


# --- what can be read off a graph --------------------------------------------------------------------------------


def critical_path(graph: nx.DiGraph) -> list[str]:
    """The chain of nodes with the most FLOPs (then the most nodes): what no amount of parallel hardware shortens."""
    weighted = nx.DiGraph()
    weighted.add_nodes_from(graph)
    weighted.add_weighted_edges_from((a, b, graph.nodes[b]["flops"] + 1) for a, b in graph.edges)
    return list(nx.dag_longest_path(weighted)) if graph else []


def live_ranges(graph: nx.DiGraph) -> dict[str, tuple[int, int]]:
    """node -> (position, position of its last user), positions in the order in which the stage runs."""
    position = {name: index for index, name in enumerate(graph)}
    return {n: (i, max((position[user] for user in graph.successors(n)), default=i)) for n, i in position.items()}


def peak_bytes(graph: nx.DiGraph) -> tuple[int, str]:
    """(largest sum of live values, the node at which it is reached); inputs are not counted, views as if they were copies.

    `CompileReport.plan` knows storages, and is exact; this is what a graph alone tells.
    """
    change = [0] * (len(graph) + 1)
    for name, (start, end) in live_ranges(graph).items():
        if graph.nodes[name]["op"] not in ("placeholder", "output"):
            change[start] += graph.nodes[name]["bytes"]
            change[end + 1] -= graph.nodes[name]["bytes"]
    best, now, where = 0, 0, ""
    for name, amount in zip(graph, change):
        now += amount
        best, where = (now, name) if now > best else (best, where)
    return best, where


# --- repeated blocks ---------------------------------------------------------------------------------------------


def block_name(module: str) -> str:
    """`model.layers.7.mlp` -> `model.layers.*.mlp`: layers of one list fall together."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", module)


def fold_blocks(graph: nx.DiGraph) -> nx.DiGraph:
    """One node a module, equal layers of a list as one (`model.layers.* ×30`): ops, bytes and FLOPs added up.

    Two layers are equal if they run the same ops, in the same order, on values of the same shapes.
    """
    label = folded_names(graph)
    folded = nx.DiGraph(name=graph.name)
    for name, fields in graph.nodes(data=True):
        if fields["op"] in ("placeholder", "output"):
            continue  # in a backward graph the saved tensors carry their modules
        node = label[name]
        if node not in folded:
            empty: dict[str, Any] = {"ops": 0, "bytes": 0, "flops": 0, "targets": {}}
            folded.add_node(node, **empty)
        entry, times = folded.nodes[node], fields["repeat"]
        entry["ops"] += times
        entry["bytes"] += fields["bytes"] * times
        entry["flops"] += fields["flops"] * times
        entry["targets"][fields["target"]] = entry["targets"].get(fields["target"], 0) + times
        for source in graph.predecessors(name):
            given = (
                graph.nodes[source]["op"] == "placeholder"
            )  # it has no module, as what is done outside of all modules
            if not given and label[source] != node and label[source] in folded:
                folded.add_edge(label[source], node)
    return folded


def folded_names(graph: nx.DiGraph) -> dict[str, str]:
    """node -> the name of the block that it folds into."""
    kinds = _layer_kinds(graph)
    return {name: _folded_name(fields["module"], kinds) for name, fields in graph.nodes(data=True)}


def _layer(module: str) -> tuple[str, str] | None:
    """`model.layers.7.mlp` -> ("model.layers", "7"): the outermost list that the module lies in."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", module)
    return (match[1] or "", match[2]) if match else None


def _layer_kinds(graph: nx.DiGraph) -> dict[tuple[str, str], str]:
    """(list, index) -> "0…29 ×30", the layers that are equal to it, those among them that were not traced."""
    content: dict[tuple[str, str], list[Any]] = {}
    times: dict[tuple[str, str], int] = {}
    for _, fields in graph.nodes(data=True):
        layer = _layer(fields["module"])
        if layer and fields["op"] not in ("placeholder", "output", "get_attr"):
            inner = fields["module"].split(layer[1], 1)[1]
            content.setdefault(layer, []).append((inner, fields["target"], fields["shape"]))
            times[layer] = fields["repeat"]
    same: dict[Any, list[str]] = {}
    for (path, index), ops in content.items():
        same.setdefault((path, tuple(sorted(ops, key=str))), []).append(index)
    names: dict[tuple[str, str], str] = {}
    for (path, _), group in same.items():
        text = _range(sorted(map(int, group)), sum(times[path, index] for index in group))
        names |= {(path, index): text for index in group}
    return names


def _range(indices: list[int], count: int) -> str:
    """Indices of traced layers, which stand for `count` -> `0…29 ×30`."""
    if count == 1:
        return str(indices[0])
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    return f"{indices[0]}…{max(indices[-1], indices[0] + step * (count - 1))} ×{count}"


def _folded_name(module: str, kinds: dict[tuple[str, str], str]) -> str:
    layer = _layer(module)
    if layer is None or layer not in kinds:
        return module or "(model)"
    head = f"{layer[0]}." if layer[0] else ""
    return f"{head}{kinds[layer]}{module[len(head) + len(layer[1]) :]}"


def human_bytes(amount: float) -> str:
    """`1.21 GB`: decimal units, as allocators and vendors count."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(amount) >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount:,.0f} B"


def human_count(amount: float) -> str:
    """`1.21 T`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(amount) >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount:,.0f} "
