"""Which kernel runs an op: candidates, tables that ship, measurements on this machine, and a choice forced by option.

A *problem* is an op with its sizes (rows in buckets of powers of two), a *candidate* one way to compute it. `choose`
takes, in this order: the candidate that the user forced; the fastest one measured on this machine (`tuning.py`); the
fastest one of the nearest entry in the table that ships for this kind of device (`tables/<kind>.json`); the first one
registered. Candidates that decline the problem are passed over. The answer says why, for the report.

To add a kernel (for CUDA too), register it when its module is imported, and import that module in `kernels/__init__`:

    dispatch.register(Candidate("lora_linear", "triton_splitk", run, devices=("cuda",), declines=why_not, kernels=(...)))

`run` has, by op (tensors in the group's compute dtype with contiguous rows, `LoRAGroup` in `qlora_compile/lora_group.py`):

    lora_linear:           run(group, x [M, K], bias [one per linear, or none]) -> ([y_i [M, N_i]], h [M, sum R])
    lora_linear_backward:  run(group, [dy_i [M, N_i]], x, h, need_dx, need_adapters) -> (dx [M, K] or None, [dA_j], [dB_j])
    dense_linear:          run(x [M, K], weight [N, K], bias or None) -> y [M, N]   (timed only: `widen_matmuls` puts it in)
    attention:             run(q [B, H, L, D], k, v, mask, causal, scale) -> out, differentiable   (timed only:
                           `lower_attention` puts it in; M queries, N keys, K the size of a head)
    grouped_lora_linear:   run(group, x [S, K]) -> (y [S, N], h [S, sum R]), `ExpertGroup` in `expert_products.py`
    grouped_lora_linear_backward:  run(group, dy, x, h, need_dx, need_adapters) -> (dx or None, [dA_j], [dB_j])
    linear_cross_entropy:  run(device type) -> the generated kernel that the sweep calls, or None   (`loss_kernels.py`; never
                           timed)

`declines(problem)` says in a few words why it cannot, or returns None; `kernels` names generated sources, which
`source_files` finds for the report. Where nothing was measured, the first one registered whose `prefers(problem)` holds
runs. `tuning.measure` times all that do not decline.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import KernelError, UnknownOptionError
from . import devices, tuning
from .tuning import Entry, read_entries

OPS = (
    *("lora_linear", "lora_linear_backward", "grouped_lora_linear", "grouped_lora_linear_backward"),
    *("dense_linear", "attention", "linear_cross_entropy"),
)
TABLES = Path(__file__).parent / "tables"


class Problem(NamedTuple):
    """What a choice depends on: `m` a bucket (see `bucket`), `n` one entry per linear of the group, `rank` their sum."""

    op: str
    m: int
    n: tuple[int, ...]
    k: int
    rank: int
    dtype: torch.dtype
    quant_type: str = "none"
    block_size: int = 0
    device: str = "cpu"
    dropout: bool = False

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        weight = "" if self.quant_type == "none" else f" {self.quant_type}/{self.block_size}"
        return f"M≤{self.m} N={'+'.join(map(str, self.n))} K={self.k} R={self.rank} {kind}{weight}"


@dataclass(frozen=True)
class Candidate:
    """One way to compute an op. See the module's docstring."""

    op: str
    name: str
    run: Callable[..., Any] | None
    devices: tuple[str, ...] = ()  # empty: every device
    declines: Callable[[Problem], str | None] = lambda problem: None
    prefers: Callable[[Problem], bool] = lambda problem: True
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The candidate that runs a problem, why it was chosen, and what the others said or took."""

    problem: Problem
    candidate: Candidate
    why: str

    @property
    def name(self) -> str:
        return self.candidate.name


_candidates: list[Candidate] = []
version = 0  # counts how often choices were forgotten, for those who keep one


def register(candidate: Candidate) -> Candidate:
    """Adds a candidate. Raises KernelError for an unknown op or a name taken."""
    if candidate.op not in OPS:
        raise KernelError(f"There is no op {candidate.op!r} to register a kernel for: known are {', '.join(OPS)}.")
    if any((known.op, known.name) == (candidate.op, candidate.name) for known in _candidates):
        raise KernelError(f"{candidate.op} already has a kernel {candidate.name!r}.")
    _candidates.append(candidate)
    forget_choices()
    return candidate


def candidates(op: str, device: str) -> list[Candidate]:
    """Those of an op on a device type, in order of preference."""
    return [c for c in _candidates if c.op == op and (not c.devices or device in c.devices)]


def check_forced(forced: dict[str, str]) -> None:
    """Raises UnknownOptionError, naming the nearest, for an op or a kernel that nobody registered."""
    for op, name in forced.items():
        if op not in OPS:
            raise UnknownOptionError(op, OPS, what="op")
        names = [c.name for c in _candidates if c.op == op]
        if name not in names:
            raise UnknownOptionError(name, names, what=f"kernel of {op}")


def bucket(rows: int) -> int:
    """The number of rows, rounded up to a power of two."""
    return 1 << max(rows - 1, 0).bit_length()


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, forced: str = "", barred: tuple[tuple[str, str], ...] = ()) -> Choice:
    """The kernel for a problem. `barred`: candidates that the tensors of a call rule out, and why. Raises KernelError if no
    candidate takes it."""
    known = candidates(problem.op, problem.device)
    reasons = {name: why for name, why in barred if name in {candidate.name for candidate in known}}
    able: dict[str, Candidate] = {}
    for candidate in known:
        reason = reasons.get(candidate.name) or candidate.declines(problem)
        if reason is None:
            able[candidate.name] = candidate
        else:
            reasons[candidate.name] = reason
    if not able:
        raise KernelError(f"No kernel takes {problem.op} {problem}: {reasons or 'none is registered'}.")
    if forced in able:
        return Choice(problem, able[forced], "forced by option")
    note = (
        f"; {forced} was asked for but declines: {reasons.get(forced, f'not for {problem.device}')}" if forced else ""
    )
    if len(able) == 1:
        (only,) = able.values()
        others = "; ".join(f"{name} declines: {why}" for name, why in reasons.items() if name != forced)
        return Choice(problem, only, (f"the only one that takes it ({others})" if others else "the only one") + note)
    for entries, source in ((tuning.measured(problem.device), "measured here"), (table(problem.device), "table")):
        found = nearest(problem, entries, exact=source != "table")
        timed = [name for name in found.microseconds if name in able] if found is not None else []
        if found is not None and timed:
            best = min(timed, key=found.microseconds.__getitem__)
            return Choice(problem, able[best], f"{source}: {found.text(timed)}{note}")
    first = next((c for c in able.values() if c.prefers(problem)), next(iter(able.values())))
    return Choice(problem, first, f"the default for {devices.kind(problem.device)}{note}")


def forget_choices() -> None:
    """After a measurement or a registration: choices are made anew."""
    global version
    version += 1
    choose.cache_clear()


@functools.cache
def table(device: str) -> tuple[Entry, ...]:
    """The shipped measurements for this machine's kind of device; empty where there are none."""
    path = TABLES / f"{devices.kind(device)}.json"
    return read_entries(json.loads(path.read_text(encoding="utf-8"))["entries"]) if path.exists() else ()


def entry_of(problem: Problem, microseconds: dict[str, float]) -> Entry:
    """The line that stands for a measured problem."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return Entry(problem.op, problem.m, problem.n, problem.k, dtype, problem.quant_type != "none", microseconds)


def nearest(problem: Problem, entries: Sequence[Entry], *, exact: bool) -> Entry | None:
    """The entry of the same op and dtype that is nearest in log2 of M (first), in that of the group's weight (then), and in
    the number of its linears."""
    mine = entry_of(problem, {})
    same = [e for e in entries if (e.op, e.dtype, e.quantized) == (mine.op, mine.dtype, mine.quantized)]
    if exact:
        return next((e for e in same if e[:6] == mine[:6]), None)

    def distance(entry: Entry) -> tuple[float, float, int]:
        size = _octaves(sum(entry.n), sum(mine.n)) + _octaves(entry.k, mine.k)
        return _octaves(entry.m, mine.m), size, abs(len(entry.n) - len(mine.n))

    return min(same, key=distance, default=None)


def _octaves(one: int, other: int) -> float:
    return abs(math.log2(max(one, 1) / max(other, 1)))


def generated(candidate: Candidate, device: str) -> tuple[str, ...]:
    """Those of a candidate's kernels that are generated on a device type."""
    from . import is_generated

    return tuple(name for name in candidate.kernels if is_generated(name, device))
