"""Which weights of the base start from their 4-bit values: base_precision="dequantized"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AdapterMismatchError
from .expert_layout import ExpertLayout
from .fold_plan import FoldPlan, first_few, resolve_key, target_of
from .formats.checkpoint_dir import TensorSpec


def mark_requantized(
    plan: FoldPlan,
    specs: Mapping[str, TensorSpec],
    weights: Sequence[str] | None,
    transposed: Sequence[str],
    config: Mapping[str, Any],
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Note which tensors start from their 4-bit values: those that `weights` names, or (None) each linear's target.

    Raises AdapterMismatchError for a weight that the base does not have.
    """
    if weights is None:
        for target in plan.targets.values():
            target.requantize = bool(target.terms) and not target.embedding
        return
    layout, missing = ExpertLayout(config), list[str]()
    for name in weights:
        key = resolve_key(name, specs, renamed)
        held = {} if key or name.endswith(".weight") else layout.tensors(name)
        found = {resolve_key(part, specs): rows for part, rows in held.items()}
        if (key is None and not found) or None in found:
            missing.append(f"the base has no {name}")
        elif key is not None:
            target = target_of(plan, specs, key, name)
            target.requantize, target.transposed = True, target.transposed or name in transposed
        for part, rows in found.items():
            if part is not None:
                target = target_of(plan, specs, part, name)
                target.requantize, target.expert, target.transposed = True, rows, rows.transposed
    if missing:
        raise AdapterMismatchError(f"The adapter was trained on another base: {first_few(missing)}.")
