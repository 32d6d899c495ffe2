"""Choices of a configuration that name nothing in the model: one warning each, an error for `modules_to_save`."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Container, Iterator

from .config import names_module, pattern_names
from .errors import ConfigError
from .foreign import is_bnb_weight
from .param_info import ParamInfo, is_adapter, is_linear_weight, site_name
from .state import ModelEdits
from .tensor import QuantizedTensor

Names = Callable[[str], bool]


def check_choices(edits: ModelEdits, targets: Container[str] | None = None) -> None:
    """Warn of each entry that has no effect, before anything is changed. `targets`: the sites that will be adapted, where
    that is known (else those that nothing declines). Raises ConfigError for modules_to_save that name no module."""
    if edits.is_foreign:
        _check_peft(edits)
        return
    modules = [name for name, _ in edits.root.named_modules()]
    for item in edits.config.modules_to_save:
        if not any(names_module((item,), name) for name in modules):
            raise ConfigError(
                f"modules_to_save names {item!r}, but {type(edits.root).__name__} has no such module{_near(item, modules)}."
            )
    entries = [entry for entry in edits.all() if not is_adapter(entry)]
    for option, item, named, only_targets in _choices(edits):
        found = [entry for entry in entries if any(named(site_name(*owner)) for owner in entry.owners)]
        reasons = [(entry.name, _decline_reason(edits, entry, targets)) for entry in found] if only_targets else []
        if not found:
            names = [entry.name for entry in entries if entry.param.dim() > 1]
            why = f"which is no linear layer of {type(edits.root).__name__}{_near(item, names)}"
        elif reasons and all(reason is not None for _, reason in reasons):
            why = f"where no adapter goes: {reasons[0][0]} stays as it is ({reasons[0][1]})"
        else:
            continue
        warnings.warn(f"{option} names {item!r}, {why}; the entry has no effect.", UserWarning, stacklevel=3)


def _check_peft(edits: ModelEdits) -> None:
    """Warn of weights under PEFT's adapters that `quantize=True` leaves dense; bitsandbytes' are in 4 bits already. Raises
    ConfigError for 4-bit weights that PEFT is to train in full."""
    copy = next((entry.name for entry in edits.all() if _is_a_copy_in_4_bits(entry)), None)
    if copy is not None:
        raise ConfigError(
            f"PEFT's modules_to_save names {copy}, which is in 4 bits and does not train: load it dense, with its "
            "module in skip_modules of QLoRAQuantizationConfig."
        )
    if not edits.is_peft or not edits.quantizes():
        return
    adapted = [entry for entry in edits.all() if not is_adapter(entry) and _is_adapted_linear(entry, edits)]
    unstored = [entry for entry in adapted if not is_bnb_weight(entry.param)]
    dense = [(entry.name, reason) for entry in unstored if (reason := edits.decline_reason(entry)) is not None]
    if adapted and not dense:
        return
    which = f"{dense[0][0]}: {dense[0][1]}" if dense else "none of its adapters is one of a linear layer"
    if len(dense) == len(adapted):
        said = f"quantize=True has no effect: it stores the weights under PEFT's LoRA layers in 4 bits ({which})."
    else:
        said = f"quantize=True leaves {len(dense)} of {len(adapted)} adapted weights as they are ({which})."
    warnings.warn(said, UserWarning, stacklevel=3)


def _is_a_copy_in_4_bits(entry: ParamInfo) -> bool:
    return isinstance(entry.param, QuantizedTensor) and "modules_to_save" in entry.name.split(".")


def _is_adapted_linear(entry: ParamInfo, edits: ModelEdits) -> bool:
    """Whether it is the weight of a linear layer, or of experts, that PEFT put an adapter on."""
    names = entry.name, entry.name.partition(".base_layer")[0]
    linear = all(is_linear_weight(module, key) for _, module, key in entry.owners)
    return (linear or entry.param.dim() == 3) and any(name in edits.tuners for name in names)


def _choices(edits: ModelEdits) -> Iterator[tuple[str, str, Names, bool]]:
    """(option, entry, what it names, whether it is for targets only). A regular expression is one entry."""
    config = edits.config
    for option in ("target_modules", "exclude_modules", "dense_modules"):
        spec = getattr(config, option)
        if isinstance(spec, tuple):
            for item in spec:
                yield option, item, functools.partial(names_module, (item,)), option != "exclude_modules"
        elif spec and option != "target_modules":  # a target expression without a match is an error
            yield option, spec, functools.partial(names_module, spec), option != "exclude_modules"
    for option in ("rank_pattern", "alpha_pattern"):
        for item in getattr(config, option):
            yield option, item, functools.partial(pattern_names, item), True


def _decline_reason(edits: ModelEdits, entry: ParamInfo, targets: Container[str] | None) -> str | None:
    reason = edits.decline_reason(entry)
    if reason is None and targets is not None and entry.name not in targets:
        return "it is no linear module: give prepare() example_inputs to have it found"
    return reason


def _near(item: str, names: list[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    near = difflib.get_close_matches(item.rpartition(".")[2], last, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
