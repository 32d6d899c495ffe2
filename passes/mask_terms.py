"""What a boolean attention mask says: "key j <= query i", and what else, read from the graph that computes it.

    arange(S)[None, :] <= arange(S)[:, None] & padding[:, None, None, :]   ->   Terms(causal=True, rest=(padding...,))

Each node of the mask's graph gets a meaning where one is known for all sizes: a whole number that counts along one
dimension, one number everywhere, or a conjunction of terms. What has none is a term of its own. Nothing is computed, so
the sizes may be symbolic. transformers builds its masks so whenever it is traced (`masking_utils`; torch before 2.14 tells
it that it is being exported), with a table lookup of positions and the sequences of a packed row in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..fx_utils import value, written

_WHOLE = slice(None)
_DTYPES = (torch.bool, torch.int32, torch.int64)


class Ramp(NamedTuple):
    """Whole numbers: the element's index along `dim` (from the end: -1 is the last), plus `shift`."""

    dim: int
    shift: int


class Constant(NamedTuple):
    """The same number everywhere."""

    number: int


class Terms(NamedTuple):
    """Booleans: all of `rest`, and key <= query (index along the last dimension <= index along the one before)."""

    causal: bool
    rest: tuple[fx.Node, ...]


Meaning = Ramp | Constant | Terms | None


class MaskReader:
    """Meanings of one graph's nodes, each found once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._found: dict[fx.Node, Meaning] = {}
        self._written = _written_into(graph)

    def terms(self, mask: Any) -> Terms:
        """What the mask says; `Terms(False, (mask,))` where nothing is known of it."""
        return _as_terms(self.meaning(mask), mask)

    def meaning(self, node: Any) -> Meaning:
        if not isinstance(node, fx.Node):
            return Constant(int(node)) if isinstance(node, (bool, int)) else None
        if node not in self._found:
            self._found[node] = None if node in self._written else self._read(node)
        return self._found[node]

    def _read(self, node: fx.Node) -> Meaning:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_method" and name.startswith("__"):  # `a == b`, as Dynamo of torch 2.11 writes it
            name = name.strip("_")
        known = node.op == "call_method" or any(node.target is getattr(m, name, None) for m in (torch, operator))
        example, rule = value(node), _RULES.get(name)
        if not known or rule is None or not isinstance(example, Tensor) or example.dtype not in _DTYPES:
            return None
        return rule(self, node)


def _written_into(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that some call writes into, and what they may be views of."""
    found = set[fx.Node]()
    for node in graph.nodes:
        target = written(node)
        while target is not None and target not in found:
            found.add(target)
            target = next(iter(target.all_input_nodes), None)
    return found


def _as_terms(meaning: Meaning, node: fx.Node) -> Terms:
    if isinstance(meaning, Terms):
        return meaning
    return Terms(False, () if isinstance(meaning, Constant) and meaning.number else (node,))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def _keeps(meaning: Meaning, before: fx.Node, after: fx.Node) -> Meaning:
    """The meaning, if `after` repeats `before` along other dimensions only than it counts along."""
    if isinstance(meaning, Ramp):
        old, new = value(before).shape, value(after).shape
        return meaning if same_size(old[meaning.dim], new[meaning.dim]) else None
    return meaning if isinstance(meaning, Constant) else None


def _arange(reader: MaskReader, node: fx.Node) -> Meaning:
    """arange(end) and arange(start, end)."""
    start = 0 if len(node.args) == 1 else node.args[0] if len(node.args) == 2 else None
    plain = isinstance(start, int) and node.kwargs.keys() <= {"device", "dtype"} and value(node).dtype != torch.bool
    return Ramp(-1, start) if plain else None  # type: ignore[arg-type]


def _filled(number: int) -> Callable[..., Meaning]:
    return lambda reader, node: Constant(number)


def _cast(reader: MaskReader, node: fx.Node) -> Meaning:
    """`to`: the same numbers, unless whole numbers become booleans."""
    old, new = value(node.args[0]), value(node)
    if (old.dtype == torch.bool) != (new.dtype == torch.bool):
        return None
    return reader.meaning(node.args[0])


def _expand(reader: MaskReader, node: fx.Node) -> Meaning:
    meaning, (before, after) = reader.meaning(node.args[0]), (value(node.args[0]).shape, value(node).shape)
    if not isinstance(meaning, Terms):
        return _keeps(meaning, node.args[0], node)  # type: ignore[arg-type]
    # terms may be repeated, but not along the two dimensions that `causal` speaks of
    return meaning if not meaning.causal or all(map(same_size, before[-2:], after[-2:])) else None


def _unsqueeze(reader: MaskReader, node: fx.Node) -> Meaning:
    meaning, dim = reader.meaning(node.args[0]), node.args[1]
    if not isinstance(meaning, Ramp):
        return meaning if isinstance(meaning, Constant) or dim == 0 else None
    new = dim if dim < 0 else dim - value(node).dim()  # type: ignore[operator]
    return Ramp(meaning.dim - (new >= meaning.dim), meaning.shift)


def _getitem(reader: MaskReader, node: fx.Node) -> Meaning:
    x, index = node.args
    parts = index if isinstance(index, tuple) else (index,)
    meaning = reader.meaning(x)
    if any(isinstance(part, fx.Node) for part in parts):
        return _looked_up(reader, meaning, node, parts)
    if isinstance(meaning, Terms):  # they are aligned from the last dimension on
        return (
            meaning if all(part in (None, _WHOLE) for part in parts) and None not in _from_first_whole(parts) else None
        )
    if not isinstance(meaning, Ramp):
        return meaning
    return _sliced(meaning, value(x).dim(), parts, value(node).dim())


def _from_first_whole(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return parts[parts.index(_WHOLE) :] if _WHOLE in parts else ()


def _sliced(meaning: Ramp, rank: int, parts: tuple[Any, ...], new_rank: int) -> Meaning:
    """x[:, None], x[:, :1] and the like, of something that counts along one dimension."""
    old = 0
    for new, part in enumerate(parts):
        if part is None:
            continue
        if old - rank == meaning.dim:
            if part == slice(None, 1) or part == slice(0, 1):
                return Constant(meaning.shift)
            return Ramp(new - new_rank, meaning.shift) if part == _WHOLE else None
        if not isinstance(part, slice):
            return None
        old += 1
    return meaning  # it counts along a dimension after those that the index names


def _looked_up(reader: MaskReader, table: Meaning, node: fx.Node, indices: tuple[Any, ...]) -> Meaning:
    """table[i, j]: for a table that counts along one dimension, that index itself."""
    if isinstance(table, Constant):
        return table
    if (
        not isinstance(table, Ramp)
        or len(indices) != value(node.args[0]).dim()
        or not all(isinstance(i, fx.Node) for i in indices)
    ):
        return None
    index = reader.meaning(indices[table.dim])
    if not isinstance(index, Ramp) or index.shift < 0:  # negative indices count from the end
        return None
    return _keeps(Ramp(index.dim, index.shift + table.shift), indices[table.dim], node)


def _difference(reader: MaskReader, node: fx.Node) -> Meaning:
    """diff along the dimension that is counted along, where what is put before the first fits too: one everywhere."""
    given = dict(zip(("input", "n", "dim", "prepend", "append"), node.args)) | node.kwargs
    ramp, first = reader.meaning(given["input"]), reader.meaning(given.get("prepend"))
    if not isinstance(ramp, Ramp) or not isinstance(first, Constant) or first.number != ramp.shift - 1:
        return None
    dim = given.get("dim", -1)
    rank = value(given["input"]).dim()
    fits = (dim if dim < 0 else dim - rank) == ramp.dim and same_size(value(given["prepend"]).shape[ramp.dim], 1)
    return Constant(1) if fits and given.get("n", 1) == 1 and given.get("append") is None else None


def _sum_of_zeros(reader: MaskReader, node: fx.Node) -> Meaning:
    meaning = reader.meaning(node.args[0])
    return meaning if isinstance(meaning, Constant) and meaning.number == 0 else None


def _add(sign: int) -> Callable[..., Meaning]:
    def rule(reader: MaskReader, node: fx.Node) -> Meaning:
        a, b = (reader.meaning(arg) for arg in node.args[:2])
        if isinstance(a, Ramp) and isinstance(b, Constant) and not node.kwargs:
            return _keeps(Ramp(a.dim, a.shift + sign * b.number), node.args[0], node)  # type: ignore[arg-type]
        if isinstance(a, Constant) and isinstance(b, Constant) and not node.kwargs:
            return Constant(a.number + sign * b.number)
        return None

    return rule


def _compare(holds: Callable[[int, int], bool], flipped: bool = False, strict: int = 0) -> Callable[..., Meaning]:
    """a <= b (>=: flipped; <, >: strict) of two that count, or any comparison of two constants."""

    def rule(reader: MaskReader, node: fx.Node) -> Meaning:
        a, b = (reader.meaning(arg) for arg in node.args[:2])
        if isinstance(a, Constant) and isinstance(b, Constant):
            return Constant(int(holds(a.number, b.number)))
        own = Terms(False, (node,))
        if holds in (operator.eq, operator.ne) or not (isinstance(a, Ramp) and isinstance(b, Ramp)):
            return own
        small, large = (b, a) if flipped else (a, b)
        sizes = value(node).shape
        whole = all(same_size(value(arg).shape[m.dim], sizes[m.dim]) for arg, m in zip(node.args, (a, b)))  # type: ignore[arg-type]
        causal = whole and (small.dim, large.dim) == (-1, -2) and small.shift + strict == large.shift
        return Terms(True, ()) if causal else own

    return rule


def _both(reader: MaskReader, node: fx.Node) -> Meaning:
    if value(node).dtype != torch.bool or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    a, b = (reader.terms(arg) for arg in node.args)
    sizes = value(node).shape
    for terms, arg in zip((a, b), node.args):
        if terms.causal and not all(map(same_size, value(arg).shape[-2:], sizes[-2:])):
            return Terms(False, (node,))
    return Terms(a.causal or b.causal, (*a.rest, *(node for node in b.rest if node not in a.rest)))


_RULES: dict[str, Callable[..., Meaning]] = {
    "arange": _arange,
    "new_ones": _filled(1),
    "ones": _filled(1),
    "new_zeros": _filled(0),
    "zeros": _filled(0),
    "to": _cast,
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "diff": _difference,
    "cumsum": _sum_of_zeros,
    "add": _add(1),
    "sub": _add(-1),
    "le": _compare(operator.le),
    "ge": _compare(operator.ge, flipped=True),
    "lt": _compare(operator.lt, strict=1),
    "gt": _compare(operator.gt, flipped=True, strict=1),
    "eq": _compare(operator.eq),
    "ne": _compare(operator.ne),
    "and_": _both,
    "bitwise_and": _both,
    "logical_and": _both,
}
