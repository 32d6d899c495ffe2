"""What the parts of a combination trained in full -> the combination's, under the keys that PEFT reads beside its layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from ..errors import AdapterMismatchError, CheckpointError
from .combine import Weight, check_finite, weight_at
from .formats.peft_files import AdapterFiles, LoraLayer, parameter_name, wrapped_key

_FROZEN = ".base_layer.weight"


def combine_full(
    files: Mapping[str, AdapterFiles], weights: Mapping[str, Weight], layers: Mapping[str, LoraLayer]
) -> dict[str, torch.Tensor]:
    """sum w S by key, which is W0 + sum w (S - W0) only where the weights add up to 1, or a part holds W0.

    Beside an adapter of an embedding or a head PEFT saves the frozen base W0. `layers` are the result's, which PEFT
    wraps. Raises CheckpointError (the base would be needed), AdapterMismatchError (other bases or shapes), ConfigError.
    """
    trained: dict[str, list[tuple[float, torch.Tensor]]] = {}
    bases: dict[str, torch.Tensor] = {}
    for label, adapter in files.items():
        for key, tensor in adapter.full_tensors().items():
            name = parameter_name(key)
            parts = trained.setdefault(name, [])
            if not key.endswith(_FROZEN):
                parts.append((weight_at(weights[label], name), tensor))
            elif not _equal(bases.setdefault(name, tensor), tensor):
                raise AdapterMismatchError(f"The adapters were trained on different bases: {key} differs.")
    wrappers = Counter(n.rpartition(".")[0] if layer.parameter else n for n, layer in layers.items())
    return {wrapped_key(n, wrappers): _combined(n, parts, bases.get(n)) for n, parts in trained.items()}


def _combined(name: str, parts: Sequence[tuple[float, torch.Tensor]], base: torch.Tensor | None) -> torch.Tensor:
    total = sum(weight for weight, _ in parts)
    if base is not None:
        parts = [(1 - total, base), *parts]
    elif not math.isclose(total, 1.0, rel_tol=1e-9):
        raise CheckpointError(
            f"{name} was trained in full and its weights do not add up to 1, so the result depends on the base: fold the "
            "adapters with export instead."
        )
    result = parts[0][1] if len(parts) == 1 else _sum_weighted(parts)
    check_finite(name, result)
    return result


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In value: a base may be loaded in another type."""
    return one.shape == other.shape and bool((one == other).all())


def _sum_weighted(parts: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """sum w S in fp64, in the dtype of the first S."""
    shapes = {tuple(tensor.shape) for _, tensor in parts}
    if len(shapes) > 1:
        raise AdapterMismatchError(f"The adapters trained tensors of different shapes {sorted(shapes)} in full.")
    total = torch.zeros(parts[0][1].shape, dtype=torch.float64)
    for weight, tensor in parts:
        total += weight * tensor.double()
    return total.to(parts[0][1].dtype)
