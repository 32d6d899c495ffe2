"""PEFT folders with weights -> one PEFT folder, without a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterMismatchError, CheckpointError
from .adapter_config import default_and_pattern
from .combine import CombineReport, Weight, check_finite, checked_options, combine_layers, weight_at
from .export_inputs import check_not_an_input
from .fold_plan import first_few
from .formats.atomic import check_output_folder, new_folder
from .formats.expert_files import flatten, module_paths, registration_order
from .formats.peft_files import PREFIX, AdapterFiles, LoraLayer, only_foldable, read_adapter, write_adapter
from .quantized_base import SIDE_FILE, read_side_file

_FROZEN = ".base_layer.weight"


def combine_folders(
    adapters: Mapping[str, Weight],
    out: str | os.PathLike[str],
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
    seed: int = 0,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> CombineReport:
    """PEFT folders with weights -> one PEFT folder in fp32, which stock peft loads; no model is needed.

    What was trained in full (`modules_to_save`) is carried over where its weights add up to 1. Raises as
    `combine_adapters`, CheckpointError, AdapterMismatchError (shapes differ), OutputError.
    """
    options = checked_options(method, rank, density, majority_sign)
    out = Path(out)
    check_not_an_input(out, [Path(label) for label in adapters])
    check_output_folder(out, overwrite=overwrite)
    files = {label: read_adapter(label, allow_pickle=allow_pickle) for label in adapters}
    parts = {label: adapter.layers() for label, adapter in files.items()}
    for label, adapter_layers in parts.items():
        special = only_foldable(adapter_layers)
        if special:
            raise AdapterMismatchError(f"The adapter {label} cannot be combined: {special}.")
    layers, report = combine_layers(str(out), parts, dict(adapters), method, options, seed, torch.float32)
    tensors = _full_tensors(files, adapters)
    paths = module_paths(registration_order(module for module, layer in layers.items() if layer.parameter))
    both = next((module for module in paths.values() if module in layers), None)
    if both is not None:
        raise AdapterMismatchError(
            f"The adapters cannot be combined: {both} is adapted as a module and by target_parameters; fold them with "
            "export instead."
        )
    for module, layer in layers.items():
        names = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A.weight", "lora_B.weight")
        factors = flatten(layer.a, layer.b) if layer.experts else (layer.a, layer.b)
        for factor, tensor in zip(names, factors, strict=True):
            tensors[f"{PREFIX}{paths.get(module, module)}.{factor}"] = tensor
    bases = sorted({str(base) for adapter in files.values() if (base := adapter.config.get("base_model_name_or_path"))})
    if len(bases) > 1:
        report.warnings.append(
            f"The adapters name different bases, {first_few(bases)}; the result needs one that is all."
        )
    extra = _side_file(list(adapters), report)
    with new_folder(out, overwrite=overwrite) as folder:
        write_adapter(folder, _config(files, layers), tensors, extra)
    return report


def _full_tensors(files: Mapping[str, AdapterFiles], weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
    """What was trained in full, by its key: sum w S, which is W0 + sum w (S - W0) only where the weights add up to 1.

    Beside an adapter of an embedding or a head PEFT saves the frozen base, which stays what it is.
    """
    found: dict[str, list[tuple[float, torch.Tensor]]] = {}
    for label, adapter in files.items():
        for key, tensor in adapter.full_tensors().items():
            found.setdefault(key, []).append((weight_at(weights[label], key.removeprefix(PREFIX)), tensor))
    out: dict[str, torch.Tensor] = {}
    for key, parts in found.items():
        if key.endswith(_FROZEN):
            out[key] = _the_same(key, [tensor for _, tensor in parts])
            continue
        if not math.isclose(sum(w for w, _ in parts), 1.0, rel_tol=1e-9):
            raise CheckpointError(
                f"{key} was trained in full and its weights do not add up to 1, so the result depends on the base: "
                "fold the adapters with export instead."
            )
        out[key] = parts[0][1] if len(parts) == 1 else _sum_weighted(parts)
        check_finite(key, out[key])
    return out


def _the_same(key: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    first = tensors[0]
    if any(tensor.shape != first.shape or not bool((tensor == first).all()) for tensor in tensors[1:]):
        raise AdapterMismatchError(f"The adapters were trained on different bases: {key} differs.")
    return first


def _sum_weighted(parts: Iterable[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """sum w S in fp64, in the dtype of the first S."""
    parts = list(parts)
    shapes = {tuple(tensor.shape) for _, tensor in parts}
    if len(shapes) > 1:
        raise AdapterMismatchError(f"The adapters trained tensors of different shapes {sorted(shapes)} in full.")
    total = torch.zeros(parts[0][1].shape, dtype=torch.float64)
    for weight, tensor in parts:
        total += weight * tensor.double()
    return total.to(parts[0][1].dtype)


def _config(files: Mapping[str, AdapterFiles], layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """adapter_config.json of the result: a scaling of 1 at each layer, and what the parts agree on.

    Layers stand there by their full names: the parts' own targets may be narrowed by further options
    (`layers_to_transform`, `exclude_modules`) or widened (`ensure_weight_tying`).
    """
    configs = [adapter.config for adapter in files.values()]

    def common(key: str) -> Any:
        values = [config.get(key) for config in configs]
        return values[0] if all(value == values[0] for value in values) else None

    rank, patterns = default_and_pattern({module: layer.rank for module, layer in layers.items()})
    saved = {name for config in configs for name in config.get("modules_to_save") or ()}
    parameters = sorted(module for module, layer in layers.items() if layer.parameter)
    biases = {config.get("bias", "none") for config in configs} - {"none"}
    return {
        "alpha_pattern": patterns,
        "base_model_name_or_path": common("base_model_name_or_path"),
        "bias": biases.pop() if len(biases) == 1 else ("all" if biases else "none"),
        "fan_in_fan_out": any(bool(config.get("fan_in_fan_out")) for config in configs),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": patterns,
        "target_modules": sorted(set(layers) - set(parameters)),
        **({"target_parameters": parameters} if parameters else {}),
        "task_type": common("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }


def _side_file(folders: list[str], report: CombineReport) -> dict[str, str]:
    """The note on the quantized base, where all parts were trained on the same."""
    noted = {read_side_file(Path(folder)) for folder in folders}
    if len(noted) > 1:
        report.warnings.append("The adapters were trained on differently quantized bases; the result notes none.")
        return {}
    base = noted.pop()
    return {SIDE_FILE: base.to_json()} if base is not None else {}
