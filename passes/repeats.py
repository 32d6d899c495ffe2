"""Runs of equal nodes in a flat graph: where a block of nodes is repeated, and where best to cut between its copies.

Nodes become tokens (what is called, with which constants, on tensors of which shape and dtype); a stack of equal layers is
then a run of tokens that repeats with some period. No module name is needed, so hand-written loops are found too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx_utils import value, written

_MIN_PERIOD = 8  # a smaller block is cheaper to compile than to call
_PERIODS = 24  # how many candidates are tried for each stretch of the graph
_MODES = ("_enter_", "_exit_", "_set_grad", "set_grad", "_saved_tensors", "_functorch")


@dataclass(frozen=True)
class Run:
    """tokens[i] == tokens[i + period] for `start` <= i < `stop` - period."""

    start: int
    stop: int
    period: int

    @property
    def saved(self) -> int:
        """Nodes that need not be compiled if each copy but one goes."""
        return ((self.stop - self.start) // self.period - 1) * self.period


class _Hole:
    def __repr__(self) -> str:
        return "%"


_HOLE = _Hole()


def sequence(graph: fx.Graph) -> list[fx.Node]:
    """The calls in order: what is neither an input nor an attribute."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def tokenize(nodes: Sequence[fx.Node]) -> list[int]:
    """One number a node, equal where the call is; a call that changes a mode, or holds a graph, equals no other."""
    known: dict[Any, int] = {}
    return [known.setdefault(_key(node), len(known)) for node in nodes]


def inputs_of(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """(the arguments as text, with "%" for each node, those nodes in order)."""
    refs: list[fx.Node] = []

    def note(ref: fx.Node) -> Any:
        refs.append(ref)
        return _HOLE

    return repr(fx.node.map_arg((node.args, node.kwargs), note)), refs


def _key(node: fx.Node) -> Any:
    name = str(getattr(node.target, "__name__", node.target))
    for_effect = not node.users and written(node) is None
    if for_effect or isinstance(node.target, torch._ops.HigherOrderOperator) or name.startswith(_MODES):
        return node
    text, refs = inputs_of(node)
    return node.op, node.target, text, tuple(_kind(ref) for ref in refs)


def _kind(node: fx.Node) -> Any:
    example = value(node)
    if isinstance(example, torch.Tensor):
        return str(tuple(example.shape)), example.dtype, type(example).__name__
    return (node.op, str(node.target)) if example is None or node.op != "placeholder" else str(example)


def best_run(tokens: Sequence[int], low: int, high: int) -> Run | None:
    """The run within tokens[low:high] that saves most; of equal ones that of the shortest block."""
    return max(_runs(tokens, low, high), key=lambda run: (run.saved, -run.period), default=None)


def _runs(tokens: Sequence[int], low: int, high: int) -> Iterator[Run]:
    for period in _periods(tokens, low, high):
        start = low
        for i in range(low, high - period + 1):
            if i < high - period and tokens[i] == tokens[i + period]:
                continue
            if i - start >= period:
                yield Run(start, i + period, period)
            start = i + 1


def _periods(tokens: Sequence[int], low: int, high: int) -> list[int]:
    """Distances from a token to its next occurrence, the most common first."""
    last: dict[int, int] = {}
    found: Counter[int] = Counter()
    for i in range(low, high):
        if tokens[i] in last:
            found[i - last[tokens[i]]] += 1
        last[tokens[i]] = i
    return [period for period, _ in found.most_common() if period >= _MIN_PERIOD][:_PERIODS]


def cuts(run: Run, nodes: Sequence[fx.Node]) -> list[int]:
    """First nodes of the first copy, best first: all copies kept, then the fewest values alive between two copies."""
    position = {node: index for index, node in enumerate(nodes)}
    alive: dict[int, int] = defaultdict(int)  # position -> values of the run that are used from there on
    copies = (run.stop - run.start) // run.period
    for index in range(run.start, min(run.stop, run.start + 2 * run.period)):
        uses = [position.get(user, len(nodes)) for user in nodes[index].users]
        for boundary in range(index + 1, min(max(uses, default=index), run.start + 2 * run.period) + 1):
            alive[boundary] += 1
    spare = run.stop - run.start - copies * run.period
    offsets = range(run.period if copies > 2 else spare + 1)
    return [run.start + o for o in sorted(offsets, key=lambda o: (o > spare, alive[run.start + o + run.period], o))]
