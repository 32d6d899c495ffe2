"""Which weights of the base start from their 4-bit values: base_precision="dequantized"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AdapterMismatchError
from .expert_layout import ExpertLayout
from .export_nf4 import linear_weights
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
    """Note which tensors start from their 4-bit values: those that `weights` names.

    None, where nobody noted them, are those that bitsandbytes makes 4-bit: in training it quantized every linear but the
    head, not only those that got an adapter.
    Raises AdapterMismatchError for a weight that the base does not have, and what `linear_weights` does.
    """
    if weights is None:
        linears = linear_weights(config, specs, renamed)[0].values()
        weights = [linear.name for linear in linears]
        transposed = [linear.name for linear in linears if linear.is_conv1d]
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
