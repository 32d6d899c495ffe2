"""Sources, as Dynamo calls them: where in the traced frame a value is read. One layer's sources turned into another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._guards import ChainedSource, Source

UNREADABLE = (AttributeError, KeyError, IndexError, TypeError, NameError)  # what reading a source may end in


def changed_sources(tx: Any) -> set[Source]:
    """What the traced code changed of what existed before it: guards see the old state there."""
    effects = tx.output.side_effects
    new = (AttributeMutationNew, ValueMutationNew)
    seen = [item for item in effects.id_to_variable.values() if not isinstance(item.mutation_type, new)]
    return {*effects.mutated_sources, *(item.source for item in seen if effects.is_modified(item))}


def with_bases(sources: Iterable[Source]) -> set[Source]:
    """The sources and all that they are read from."""
    found: set[Source] = set()
    pending = list(sources)
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            if isinstance(source, ChainedSource):
                pending += [
                    part for f in dataclasses.fields(source) if isinstance(part := getattr(source, f.name), Source)
                ]
    return found


class Moves:
    """Sources of one layer -> those of another, and what stands there."""

    def __init__(self, tx: Any, old: Sequence[Source | None], new: Sequence[Source | None]) -> None:
        self.known: dict[Source, Source] = {
            a: b for a, b in zip(old, new, strict=True) if a is not None and b is not None
        }
        self.scope = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
        self.values: dict[Source, Any] = {}

    def __call__(self, source: Source) -> Source:
        found = self.known.get(source)
        if found is None:
            found = source
            if isinstance(source, ChainedSource):
                parts = ((field.name, getattr(source, field.name)) for field in dataclasses.fields(source))
                moved = {name: self(part) for name, part in parts if isinstance(part, Source)}
                if any(part != getattr(source, name) for name, part in moved.items()):
                    found = dataclasses.replace(source, **moved)
            self.known[source] = found
        return found

    def value(self, source: Source) -> Any:
        return source.get_value(self.scope, {}, self.values)
