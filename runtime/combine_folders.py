"""PEFT folders with weights -> one PEFT folder, without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterMismatchError
from .adapter_config import default_and_pattern
from .combine import CombineReport, Weight, checked_options, combine_layers
from .combine_full import combine_full
from .export_inputs import check_not_an_input
from .fold_plan import first_few
from .formats.atomic import check_output_folder, new_folder
from .formats.expert_files import flatten, module_paths, registration_order
from .formats.peft_files import PREFIX, AdapterFiles, LoraLayer, only_foldable, read_adapter, write_adapter
from .quantized_base import SIDE_FILE, read_side_file


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

    What was trained in full is carried over where that needs no base (`combine_full`). Raises as
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
    tensors = combine_full(files, adapters, layers)
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
    # of a module that also has a layer PEFT would take one and drop the other; `combine_full` names it inside of the layer
    saved = {name for name in saved if not any(f".{module}".endswith(f".{name}") for module in layers)}
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
