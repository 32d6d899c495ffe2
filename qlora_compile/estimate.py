"""What a training step of a model needs before anything runs: bytes by kind and phase, what fits, FLOPs, a lower time.

One trace on fake tensors gives every buffer's size as a formula in batch and sequence length; the rest is arithmetic.
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

import torch
from torch import nn

from .config import QLoRAConfig
from .errors import ConfigError, ModelStateError, UnknownOptionError
from .memory_plan import MemoryPlan, Peak
from .step_graphs import Symbols
from .tracing import meta_copy, trace

SYMBOLS = Symbols(7919, 100003)  # primes that divide no model's dimensions
# bytes of optimizer state by trainable parameter: on the device, and on the host
OPTIMIZERS = {"adamw": (8, 0), "paged-adamw": (0, 8), "lion": (4, 0), "paged-lion": (0, 4), "sgd": (0, 0)}
BUDGETS = (0.75, 0.5, 0.25)
TABLE_BATCHES = (1, 2, 4, 8, 16)
TABLE_SEQS = (512, 1024, 2048, 4096, 8192)
PHASES = ("forward", "backward", "optimizer")
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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
    budget: float | None = None
    roofline_s: float | None = None
    device: str | None = None

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
    """One traced model; everything for any batch and sequence length is read off its plan."""

    def __init__(self, model: nn.Module, config: QLoRAConfig, optimizer: str = "adamw") -> None:
        if optimizer not in OPTIMIZERS:
            raise UnknownOptionError(optimizer, OPTIMIZERS, what="optimizer")
        self.model, self.config, self.optimizer = meta_copy(model).train(), config, optimizer
        self.limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """The plan of keeping everything. What a budget leaves of the saved activations is its fraction by definition."""
        tokens = torch.zeros(SYMBOLS.batch, SYMBOLS.seq, dtype=torch.long, device="meta")
        config = dataclasses.replace(self.config, activation_budget=1.0)
        plan = trace(self.model, {"input_ids": tokens, "labels": tokens}, config, symbols=SYMBOLS).plan
        if plan is None:
            raise ModelStateError(
                "The layers of this model do not run one after the other, so nothing can be estimated."
            )
        return plan

    def trainable_bytes(self, plan: MemoryPlan) -> int:
        return plan.resident.get("adapters", 0) + plan.resident.get("trained", 0)

    def state_bytes(self, plan: MemoryPlan) -> tuple[int, int]:
        """Optimizer state on the device and on the host, for the stored width of the adapters."""
        count = self.trainable_bytes(plan) // self.config.adapter_dtype.itemsize
        device, host = OPTIMIZERS[self.optimizer]
        return device * count, host * count

    def peaks(self, plan: MemoryPlan, budget: float | None = None) -> dict[str, Peak]:
        """By phase, after the first step: the optimizer's state is there all the time, gradients from the backward on."""
        state, _ = self.state_bytes(plan)
        found = {}
        for phase in ("forward", "backward"):
            peak = plan.peak(phase)
            saved = int(peak.by_kind.get("saved", 0) * (self.config.activation_budget if budget is None else budget))
            found[phase] = _with(peak, optimizer=state, saved=saved)
        trainable = self.trainable_bytes(plan)
        # an update of one tensor at a time: its denominator and its step, of the largest adapter
        resident = plan.resident_bytes() | {"gradients": trainable, "optimizer": state}
        found["optimizer"] = Peak(sum(resident.values()), 0, {k: v for k, v in resident.items() if v})
        return found

    def peak_at(self, batch: int, seq_len: int, budget: float | None = None) -> int:
        return max(peak.bytes for peak in self.peaks(self.plan.at(batch, seq_len), budget).values())

    def __call__(self, batch: int, seq_len: int, memory: int | None = None, device: str | None = None) -> Estimate:
        """The estimate; with `memory` what is the most that fits, with `device` a time from its data sheet."""
        _check_counts(batch, seq_len)
        plan = self.plan.at(batch, seq_len)
        found = Estimate(
            type(self.model).__name__, batch, seq_len, memory, self.peaks(plan), self.state_bytes(plan)[1],
            plan.saved_bytes(), plan.flops(), plan.traffic(),
        )  # fmt: skip
        found.table = {b: {s: self.peak_at(b, s) for s in TABLE_SEQS} for b in TABLE_BATCHES}
        if memory is not None:
            found.largest_batch = largest(lambda b: self.peak_at(b, seq_len) <= memory)
            found.longest_seq = largest(lambda s: self.peak_at(batch, s) <= memory, self.limit)
            if not found.fits:
                found.budget = self._cheapest_budget(batch, seq_len, memory)
        if device is not None:
            found.device, found.roofline_s = device, roofline_seconds(plan, device)
        return found

    def _cheapest_budget(self, batch: int, seq_len: int, memory: int) -> float | None:
        """The largest activation budget, of a few, with which it fits; None if none does."""
        for budget in BUDGETS:
            if budget >= self.config.activation_budget:
                continue
            if self.peak_at(batch, seq_len, budget) <= memory:
                return budget
        return None


def _check_counts(batch: int, seq_len: int) -> None:
    for name, number in (("batch", batch), ("seq_len", seq_len)):
        if number < 1:
            raise ConfigError(f"{name} must be at least 1, got {number}.")


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
