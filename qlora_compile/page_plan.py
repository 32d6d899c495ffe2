"""What the pass over the backward graph may know of a paged optimizer, and what it planned: sizes and times, no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import MemoryBudgetError, UnknownOptionError


@dataclass(frozen=True)
class Speeds:
    """FLOP/s of products, bytes/s of memory, bytes/s of a copy between the tiers."""

    flops: float
    memory: float
    copy: float


# Guesses to place copies by, on the fast side for the computation: a prefetch that comes early waits in its page.
# cuda: NVIDIA's H100 SXM data sheet, and pinned copies over PCIe 5; cpu: two to eight cores with AVX-512.
SPEEDS = {"cuda": Speeds(990e12, 3.35e12, 25e9), "cpu": Speeds(200e9, 20e9, 4e9)}
FILE_COPY = 1e9  # bytes/s where the host tier is a file
MIN_PAGE_BYTES = 4096  # a memory map is cut at multiples of the system's page
PAGED = ("paged_adamw", "paged_adamw8bit", "paged_lion")


@dataclass(frozen=True)
class PagedParameter:
    """`number` is its place in the optimizer; `state_bytes` what its update needs; `gradient_bytes` 0: not in a page."""

    number: int
    name: str
    state_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class PageLink:
    """One paged optimizer, as far as it has parameters of one graph. `parameters` by position among the graph's inputs;
    `in_all`: how many it has."""

    pager: int
    optimizer: str
    in_all: int
    parameters: Mapping[int, PagedParameter]
    step_in_backward: bool
    budget: int | None
    page_bytes: int
    speeds: Speeds

    def idle_reason(self) -> str | None:
        """Why the backward graph has nothing to do for it, or None."""
        if self.step_in_backward or self.budget is not None:
            return None
        return "it has no device_budget: all of its state stays on the device"


@dataclass(frozen=True)
class PlannedOptimizer:
    """A paged optimizer that nobody has made yet, for `trace`: named as in `finetune`, with a budget in bytes (None: all
    of its state stays on the device)."""

    name: str = "paged_adamw"
    budget: int | None = None
    step_in_backward: bool = False

    def __post_init__(self) -> None:
        if self.name not in PAGED:
            raise UnknownOptionError(self.name, PAGED, what="paged optimizer")
        if self.budget is not None and self.budget < MIN_PAGE_BYTES:
            raise MemoryBudgetError(
                f"A budget of {self.budget} bytes is too small: the least that works is one page of {MIN_PAGE_BYTES} bytes."
            )


@dataclass(frozen=True)
class PageMove:
    """A prefetch: issued `issued_ms` into the backward pass, its copy from `begun_ms` on (copies queue), needed at
    `needed_ms`; what of the copy the nodes hide."""

    parameters: tuple[str, ...]
    bytes: int
    after: str  # the node that it follows; "" at the start
    issued_ms: float
    needed_ms: float
    copy_ms: float
    hidden_ms: float
    begun_ms: float


@dataclass
class PageTimeline:
    """One optimizer's plan for one backward graph, in estimated ms. `resident` is [(ms, state bytes, gradient bytes)]."""

    optimizer: str
    budget: int | None
    step_in_backward: bool
    backward_ms: float
    prefetches: list[PageMove] = field(default_factory=list)
    resident: list[tuple[float, int, int]] = field(default_factory=list)
    gradients_in_pages: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most that the plan has on the device."""
        return max((state + gradient for _, state, gradient in self.resident), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PageTimeline:
        """The reverse of `dataclasses.asdict`, also by way of JSON. Raises TypeError or KeyError for other fields."""
        moves = [PageMove(**move | {"parameters": tuple(move["parameters"])}) for move in fields["prefetches"]]
        return cls(**{**fields, "prefetches": moves, "resident": [tuple(step) for step in fields["resident"]]})
