"""Bytes of a model: what it holds through a step, and the most that a step takes, counted by the CPU's allocator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .lora_group import release_scratch
from .memory_plan import merge_resident
from .modules import adapter_parameters
from .repetition import Repeat, unfold_name
from .tensor import QuantizedTensor


def resident_bytes(model: nn.Module, repeats: Sequence[Repeat] = ()) -> dict[str, int]:
    """Bytes that live through a step: "weights" (4-bit and dense, buffers too), "adapters", "trained" in full."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    named = list(model.named_parameters())
    kinds = {"adapters": [], "trained": [], "weights": []}  # type: dict[str, list[tuple[str, torch.Tensor]]]
    for name, parameter in named:
        kind = "adapters" if id(parameter) in adapters else "trained" if parameter.requires_grad else "weights"
        kinds[kind].append((name, parameter))
    kinds["weights"] += list(model.named_buffers())
    return merge_resident({kind: bytes_of(tensors, repeats) for kind, tensors in kinds.items()})


def bytes_of(named: Any, repeats: Sequence[Repeat]) -> int:
    """Bytes of named tensors, those of a traced layer once for each layer that is equal to it."""
    return sum(_stored_bytes(tensor) * len(unfold_name(name, repeats)) for name, tensor in named)


def _stored_bytes(tensor: torch.Tensor) -> int:
    return tensor.stored_bytes if isinstance(tensor, QuantizedTensor) else tensor.numel() * tensor.element_size()


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """What `run` takes of torch's CPU allocator beyond what was there before: at its peak, and when it is done with its
    result still alive. In bytes; other threads, such as the page pool's, are not seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def measured_peak(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes at the widest moment of one forward and backward pass on the CPU, what the model holds included: what the
    plan of a step is compared with. `model(**batch)` has a loss."""
    held = sum(resident_bytes(model).values())
    release_scratch()
    return held + allocated(lambda: model(**batch).loss.backward())[0]
