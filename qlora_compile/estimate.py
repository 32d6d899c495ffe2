"""What a training step of a model needs before anything runs: bytes by kind and phase, what fits, FLOPs, a lower time.

Traces on fake tensors give every buffer's size by batch and sequence length (step_plans.py); the rest is arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import QLoRAConfig
from .counts import check_counts
from .errors import ConfigError, UnknownOptionError
from .memory_plan import MemoryPlan, Peak
from .positions import most_positions
from .step_plans import StepPlans

# bytes of optimizer state by trainable parameter; 8 bits: two codes, and an fp32 scale of each for a block of 256
OPTIMIZERS = {
    "adamw": 8.0,
    "paged_adamw": 8.0,
    "paged_adamw8bit": 2 + 8 / 256,
    "lion": 4.0,
    "paged_lion": 4.0,
    "sgd": 0.0,
}
BUDGETS = tuple(round(0.95 - 0.05 * i, 2) for i in range(19))  # 0.95 to 0.05
TABLE_BATCHES = (1, 2, 4, 8, 16)
TABLE_SEQS = (512, 1024, 2048, 4096, 8192)
PHASES = ("forward", "backward", "optimizer")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Way:
    """Options that make it fit, and the peak with them; `approximate` where activations are recomputed."""

    options: str
    peak: int
    approximate: bool = False


@dataclass
class Estimate:
    """Peaks of one step by phase and kind, and what follows from them. Bytes; seconds; FLOPs of a step."""

    model: str
    batch: int
    seq_len: int
    device_memory: int | None
    peaks: dict[str, Peak]
    host_bytes: int
    saved_bytes: int
    flops: int
    traffic: int
    table: dict[int, dict[int, int]] = field(default_factory=dict)  # batch -> sequence length -> peak bytes
    largest_batch: int | None = None
    longest_seq: int | None = None
    ways: list[Way] = field(default_factory=list)
    roofline_s: float | None = None
    device: str | None = None
    fitted: tuple[int, ...] = ()  # its ops change with the length: from traces of these

    @property
    def peak(self) -> int:
        return max(peak.bytes for peak in self.peaks.values())

    @property
    def fits(self) -> bool | None:
        return None if self.device_memory is None else self.peak <= self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        peaks = {phase: {"bytes": peak.bytes, "by_kind": peak.by_kind} for phase, peak in self.peaks.items()}
        return dataclasses.asdict(self) | {"peaks": peaks, "peak": self.peak, "fits": self.fits}


class Estimator:
    """One traced model; everything for any batch and sequence length is read off its plan.

    `device`: the kind of device that it is for, "cpu" or "cuda" (None: this machine's), as in `trace`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: QLoRAConfig,
        optimizer: str = "adamw",
        optimizer_budget: int | None = None,
        device: str | None = None,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise UnknownOptionError(optimizer, OPTIMIZERS, what="optimizer")
        if optimizer_budget is not None and not optimizer.startswith("paged_"):
            raise ConfigError("An optimizer budget is for the paged optimizers: choose paged_adamw.")
        self.config = config
        self.plans = StepPlans(model, dataclasses.replace(config, activation_budget=1.0), device)
        self.model = self.plans.model
        self.optimizer, self.optimizer_budget = optimizer, optimizer_budget
        self.device = device
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.classes = 0 if head is None else len(head.weight)
        self.limit = most_positions(model)

    def trainable_bytes(self, plan: MemoryPlan) -> int:
        return plan.resident.get("adapters", 0) + plan.resident.get("trained", 0)

    def state_bytes(self, plan: MemoryPlan) -> tuple[int, int]:
        """Optimizer state on the device and, beyond a paged optimizer's budget, on the host."""
        count = self.trainable_bytes(plan) // self.config.adapter_dtype.itemsize
        state = int(OPTIMIZERS[self.optimizer] * count)
        device = state if self.optimizer_budget is None else min(state, self.optimizer_budget)
        return device, state - device

    def _peaks(self, plan: MemoryPlan, budget: float | None = None) -> dict[str, Peak]:
        """By phase, after the first step: the optimizer's state is there all the time, gradients from the backward on."""
        state, _ = self.state_bytes(plan)
        found = {}
        for phase in ("forward", "backward"):
            peak = self._with_logits(plan, plan.peak(phase))
            kept, saved = self.config.activation_budget if budget is None else budget, peak.by_kind.get("saved", 0)
            again = 0 if kept == 1 else int(_largest_layer(plan) * (1 - kept))
            found[phase] = _with(peak, optimizer=state, saved=int(saved * kept), recomputed=min(again, saved))
        trainable = self.trainable_bytes(plan)
        # an update of one tensor at a time: its denominator and its step, of the largest adapter
        resident = plan.resident_bytes() | {"gradients": trainable, "optimizer": state}
        resident = _moved(resident, "logits", {"workspace": _chunk_of_logits(plan)})
        found["optimizer"] = Peak(sum(resident.values()), 0, {k: v for k, v in resident.items() if v})
        return found

    def _with_logits(self, plan: MemoryPlan, peak: Peak) -> Peak:
        """The logits and what the loss makes of them (a number for each token and class) as a kind of their own."""
        moved = {"workspace": _chunk_of_logits(plan)}
        for buffer in plan.live_at(peak.event) if self.classes else ():
            size = buffer.size
            if buffer.kind == "workspace" and ": logits" in buffer.name:
                moved["workspace"] += plan.size(size)
            elif size.b == size.s == 1 and not size.chunk and size.coefficient % self.classes == 0:
                moved[buffer.kind] = moved.get(buffer.kind, 0) + plan.size(size)
        return Peak(peak.bytes, peak.event, _moved(peak.by_kind, "logits", moved))

    def peaks_at(self, batch: int, seq_len: int, budget: float | None = None) -> dict[str, Peak]:
        """By phase, for this batch and length; `budget`: the part of the activations that is kept (None: as configured)."""

        def flat(plan: MemoryPlan) -> dict[tuple[str, str], float]:
            peaks = self._peaks(plan, budget)
            return {(phase, kind): n for phase, peak in peaks.items() for kind, n in peak.by_kind.items()}

        found: dict[str, dict[str, int]] = {phase: {} for phase in PHASES}
        for (phase, kind), amount in self.plans.read(batch, seq_len, flat).items():
            found[phase] |= {kind: round(amount)} if round(amount) else {}
        return {phase: Peak(sum(by_kind.values()), 0, by_kind) for phase, by_kind in found.items()}

    def peak_at(self, batch: int, seq_len: int, budget: float | None = None) -> int:
        return max(peak.bytes for peak in self.peaks_at(batch, seq_len, budget).values())

    def __call__(self, batch: int, seq_len: int, memory: int | None = None, device: str | None = None) -> Estimate:
        """The estimate; with `memory` what is the most that fits, with `device` a time from its data sheet."""
        check_counts(batch, seq_len)
        peaks = self.peaks_at(batch, seq_len)
        numbers = self.plans.read(batch, seq_len, _numbers)
        found = Estimate(
            type(self.model).__name__, batch, seq_len, memory, peaks, self.state_bytes(self.plans.one)[1],
            round(numbers["saved"]), round(numbers["flops"]), round(numbers["traffic"]),
            fitted=tuple(length for length in self.plans.by_length if length),
        )  # fmt: skip
        found.table = {b: {s: self.peak_at(b, s) for s in TABLE_SEQS} for b in TABLE_BATCHES}
        if memory is not None:
            found.largest_batch = largest(lambda b: self.peak_at(b, seq_len) <= memory)
            found.longest_seq = largest(lambda s: self.peak_at(batch, s) <= memory, self.limit)
            if not found.fits:
                found.ways = self.ways(batch, seq_len, memory)
        if device is not None:
            read = self.plans.read(batch, seq_len, lambda plan: {"seconds": roofline_seconds(plan, device)})
            found.device, found.roofline_s = device, read["seconds"]
        return found

    def ways(self, batch: int, seq_len: int, memory: int) -> list[Way]:
        """What makes it fit: the largest activation budget for the options as they are, then for those with chunks of
        logits, then for those with a paged optimizer too. It ends at the first of these that fit without recomputing.
        """
        found: list[Way] = []
        for options, changed in self._cheaper(batch, seq_len):
            peak = changed.peak_at(batch, seq_len)
            if options and peak <= memory:
                return [*found, Way(options, peak)]
            for budget in BUDGETS:
                peak = changed.peak_at(batch, seq_len, budget)
                if budget < self.config.activation_budget and peak <= memory:
                    found.append(Way(f"{options} --activation-budget {budget:g}".strip(), peak, approximate=True))
                    break
        return found

    @functools.cached_property
    def in_chunks(self) -> Estimator:
        """The same with the loss in chunks of logits: a trace of its own."""
        config = dataclasses.replace(self.config, keep_logits=False)
        return Estimator(self.model, config, self.optimizer, self.optimizer_budget, self.device)

    def _cheaper(self, batch: int, seq_len: int) -> list[tuple[str, Estimator]]:
        """(options, the estimator with them): as it is, then with what costs no time, then with what costs little."""
        found = [("", self)]
        if self.config.keep_logits:
            found.append(("--no-keep-logits", self.in_chunks))
        options, last = found[-1]
        state, _ = self.state_bytes(self.plans.one)
        paged = self.optimizer if self.optimizer.startswith("paged_") else f"paged_{self.optimizer}"
        if paged in OPTIMIZERS and self.optimizer_budget is None:
            budget, unit, shift = state // 8, "MiB", 20
            if budget >> shift == 0:
                budget, unit, shift = max(budget, 4096), "KiB", 10  # a page has 4 KiB at least
            changed = Estimator(self.model, last.config, paged, budget >> shift << shift, self.device)
            changed.plans = last.plans  # the optimizer is no part of what was traced
            found.append((f"{options} --optimizer {paged} --optimizer-budget {budget >> shift}{unit}".strip(), changed))
        return found


def _numbers(plan: MemoryPlan) -> dict[str, float]:
    return {"saved": plan.saved_bytes(), "flops": plan.flops(), "traffic": plan.traffic()}


def _chunk_of_logits(plan: MemoryPlan) -> int:
    return sum(plan.size(size) for name, size in plan.scratch.items() if name.startswith("logits"))


def _moved(by_kind: dict[str, int], to: str, amounts: dict[str, int]) -> dict[str, int]:
    """Some of the bytes of several kinds as another kind; what is then nothing is left out."""
    changed = dict(by_kind)
    for kind, amount in amounts.items():
        changed[kind] = changed.get(kind, 0) - amount
        changed[to] = changed.get(to, 0) + amount
    return {kind: amount for kind, amount in changed.items() if amount}


def _largest_layer(plan: MemoryPlan) -> int:
    """Bytes that the forward saves in the layer that saves the most: what recomputing it brings back for a while."""
    layers: dict[str, int] = {}
    for buffer in plan.buffers:
        layer = re.match(r"(?:.*?\.)?\d+(?=\.|$)", buffer.module)
        if buffer.kind == "saved" and layer:
            layers[layer[0]] = layers.get(layer[0], 0) + plan.size(buffer.size)
    return max(layers.values(), default=0)


def _with(peak: Peak, **more: int) -> Peak:
    by_kind = peak.by_kind | {kind: amount for kind, amount in more.items() if amount}
    return Peak(sum(by_kind.values()), peak.event, by_kind)


def largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """The largest whole number that fits (0: none does), found by doubling and halving; at most `limit` (2^24)."""
    limit = limit or 1 << 24
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def devices() -> dict[str, dict[str, float]]:
    """Memory, bf16 FLOP/s (dense, fp32 accumulation) and bytes/s by device, from the vendors' data sheets."""
    text = importlib.resources.files(__package__).joinpath("devices.json").read_text(encoding="utf-8")
    return json.loads(text)


def find_device(name: str) -> str:
    """The device's name as the data file has it. Raises UnknownOptionError naming the nearest."""
    known = {each.lower(): each for each in devices()}
    if name.lower() not in known:
        raise UnknownOptionError(name, devices(), what="device")
    return known[name.lower()]


def roofline_seconds(plan: MemoryPlan, device: str) -> float:
    """No step is faster: each product takes its FLOPs at the peak rate or its bytes at full bandwidth, whichever is more.

    What is neither product nor attention counts nothing, as if it were all fused into them.
    """
    sheet = devices()[find_device(device)]
    seconds = 0.0
    for event in plan.events:
        flops = sum(plan.size(size) for size in event.flops)
        moved = sum(plan.size(size) for size in event.traffic)
        seconds += max(flops / sheet["bf16_flops"], moved / sheet["bytes_per_s"])
    return seconds


def parse_bytes(text: str) -> int:
    """`24GiB`, `24GB`, `24g`, `25769803776` -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"An amount of memory is a number with a unit (24GiB, 80GB), got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2]])
