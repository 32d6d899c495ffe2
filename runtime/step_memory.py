"""Whether a step fits a budget of device memory, by the plan of its graphs, before it runs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..config import QLoRAConfig
from ..errors import MemoryBudgetError
from ..estimate import Estimator, largest
from .memory import format_bytes, parse_bytes


class Room(NamedTuple):
    """How many rows a micro-batch may have; whether a paged optimizer's pages must be on the host for it."""

    rows: int
    without_pages: bool


class StepMemory:
    """What `estimate` says of a step of `model`, which is not prepared yet, against `budget` (bytes or "16GiB").

    Weights, adapters, gradients, activations and workspace count, and optimizer state: all of it, or up to
    `optimizer_budget`. Raises MemoryBudgetError where not even one row of `seq_len` tokens fits, and ModelStateError for
    a model whose layers do not run one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QLoRAConfig,
        budget: int | str,
        *,
        seq_len: int,
        optimizer: str = "adamw",
        optimizer_budget: int | str | None = None,
        device: str = "cpu",
    ) -> None:
        self.budget = parse_bytes(budget)
        state = None if optimizer_budget is None else parse_bytes(optimizer_budget)
        self._estimator = Estimator(model, config, optimizer, state, device)
        self._paged = optimizer.startswith("paged_")
        self._known: dict[tuple[int, int], Room] = {}
        self.room(1, seq_len)

    def room(self, rows: int, seq_len: int) -> Room:
        """The most of `rows` that fit together, with the pages on the device if that makes no difference."""
        if (rows, seq_len) not in self._known:
            self._known[rows, seq_len] = self._find(rows, seq_len)
        return self._known[rows, seq_len]

    def _find(self, rows: int, seq_len: int) -> Room:
        if self._bytes(rows, seq_len, pages=True) <= self.budget:
            return Room(rows, False)
        fitting = largest(lambda count: self._bytes(count, seq_len, pages=not self._paged) <= self.budget, rows)
        if fitting == 0:
            least = self._bytes(1, seq_len, pages=not self._paged)
            raise MemoryBudgetError(
                f"One sequence of {seq_len} tokens takes about {format_bytes(least)}, more than the memory budget of "
                f"{format_bytes(self.budget)}: give so much, a smaller seq_len, or an activation_budget below 1."
            )
        return Room(fitting, self._paged)

    def _bytes(self, rows: int, seq_len: int, *, pages: bool) -> int:
        """At the peak of a step. Without pages the state comes back when the activations are gone."""
        peaks = self._estimator.peaks_at(rows, seq_len)
        state = 0 if pages else peaks["forward"].by_kind.get("optimizer", 0)
        return max(max(peaks[phase].bytes for phase in ("forward", "backward")) - state, peaks["optimizer"].bytes)
