"""base + adapters -> one ordinary checkpoint, streamed tensor by tensor, each folded weight rounded once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import parse_dtype
from ..errors import CheckpointError, ConfigError, InvalidWeightError
from .export_inputs import Adapters, PathLike, check_not_an_input, dense_folder, lora_only, read_adapters
from .export_report import ExportReport
from .export_sources import FolderSource, ModelSource, WeightSource, unwrap
from .fold import fold, measure
from .fold_plan import FoldPlan, Target, WeightedAdapter, mark_requantized, plan_fold
from .formats.atomic import check_output_folder, new_folder
from .formats.checkpoint_dir import TensorSpec, parse_size, read_json, write_checkpoint
from .quantized_base import QuantizedBase, common_base, read_side_file
from .verify import verify_folder, verify_model

FORMATS = ("safetensors", "nf4", "gguf")
BASE_PRECISIONS = ("original", "dequantized")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """Everything that is fixed before the first tensor is written."""

    source: WeightSource
    plan: FoldPlan
    adapters: list[WeightedAdapter]
    base_precision: str
    quantized: QuantizedBase | None
    dtype: torch.dtype | None
    max_shard_size_bytes: int
    report: bool
    progress: Progress | None
    verify: Callable[[Path, torch.dtype, FoldPlan, QuantizedBase | None], Any] | None


def export(
    model_or_dir: nn.Module | PathLike,
    out: PathLike,
    adapters: Adapters = None,
    base_precision: str = "original",
    format: str = "safetensors",
    *,
    base: PathLike | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = False,
    report: bool = False,
    overwrite: bool = False,
    quant: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold adapters into a base and write a checkpoint that stock transformers loads.

    `model_or_dir` is a safetensors folder, a .gguf file, or a prepared model. `adapters` maps PEFT folders (or, for a
    model, names of its adapters) to weights; a list counts each as 1, None takes what is active on the model.
    `base_precision="original"` folds into the base's own values, "dequantized" into the 4-bit values that the adapter
    was trained on (`quant` overrides what the adapter's folder notes about them). A prepared model holds no original
    values: name its folder as `base` for those. Each tensor keeps its dtype unless `dtype` is given.

    `verify` compares logits with base + adapters before the result appears, `report` measures each layer's error,
    `progress(done_bytes, total_bytes)` is called after each tensor. One tensor is in memory at a time, and `out`
    appears at the end, whole, or not at all. Raises ConfigError, CheckpointError, AdapterMismatchError, OutputError.
    """
    _check_choices(format, base_precision)
    out = Path(out)
    out_dtype = None if dtype is None else parse_dtype(dtype)
    size = parse_size(max_shard_size)
    start = time.perf_counter()
    model = unwrap(model_or_dir) if isinstance(model_or_dir, nn.Module) else None
    folder = Path(base) if base is not None else (None if model else Path(model_or_dir))  # type: ignore[arg-type]
    weighted = read_adapters(model, adapters, allow_pickle)
    check_not_an_input(out, [p for p in (folder, *(adapter.folder for adapter in weighted)) if p is not None])
    check_output_folder(out, overwrite=overwrite)
    with dense_folder(folder) as dense:
        job = _Job(
            *_plan(model, dense, weighted, base_precision, quant),
            dtype=out_dtype,
            max_shard_size_bytes=size,
            report=report,
            progress=progress,
            verify=_verifier(model, dense, weighted) if verify else None,
        )
        result = _write(job, out, overwrite)
    return replace(result, seconds=time.perf_counter() - start)


def _plan(
    model: nn.Module | None,
    folder: Path | None,
    adapters: list[WeightedAdapter],
    base_precision: str,
    quant: Mapping[str, Any] | None,
) -> tuple[WeightSource, FoldPlan, list[WeightedAdapter], str, QuantizedBase | None]:
    """Open the base and match the adapters with it, before anything is written."""
    if folder is None:
        assert model is not None
        source: WeightSource = ModelSource(model)
        if base_precision == "original" and QuantizedBase.of_model(model).weights:
            raise ConfigError(
                "A quantized model does not hold its original weights: name their folder with base=..., "
                "or fold into the 4-bit values with base_precision='dequantized'."
            )
        # The model's own values are the 4-bit ones, and what it trained in full is already in it.
        loras = [replace(a, files=replace(a.files, tensors=lora_only(a))) if a.folder is None else a for a in adapters]
        return source, plan_fold(source.specs, source.config, loras), loras, base_precision, None
    source = FolderSource(folder)
    plan = plan_fold(source.specs, source.config, adapters)
    if base_precision == "original":
        return source, plan, adapters, base_precision, None
    if quant is not None:
        quantized = QuantizedBase.from_dict(quant)
    elif model is not None:
        quantized = QuantizedBase.of_model(model)
    else:
        quantized = common_base(read_side_file(a.folder) for a in adapters if a.folder is not None)
    mark_requantized(plan, source.specs, quantized.weights, quantized.transposed)
    return source, plan, adapters, base_precision, quantized


def _write(job: _Job, out: Path, overwrite: bool) -> ExportReport:
    specs = _written_specs(job)
    total_bytes, done_bytes = sum(spec.nbytes for spec in specs.values()), 0
    result = ExportReport(out, "safetensors", job.base_precision, {a.label: a.weight for a in job.adapters})
    result.folded, result.copied = len(job.plan.targets), len(specs) - len(job.plan.targets)
    result.total_bytes = total_bytes

    def produce(key: str) -> torch.Tensor:
        nonlocal done_bytes
        target = job.plan.targets.get(key)
        if target is None:
            tensor = job.source.tensor(key).to(specs[key].dtype)
        else:
            tensor = _fold_one(job, key, target, specs[key].dtype, result)
        done_bytes += specs[key].nbytes
        if job.progress is not None:
            job.progress(done_bytes, total_bytes)
        return tensor

    with new_folder(out, overwrite=overwrite) as folder:
        job.source.write_side_files(folder)
        _edit_config(folder / "config.json", untie=job.plan.untie, dtype=job.dtype)
        write_checkpoint(folder, specs, produce, job.max_shard_size_bytes)
        if job.verify is not None:
            rounded = [specs[key].dtype for key in job.plan.targets] or [torch.float32]
            coarsest = max(rounded, key=lambda d: torch.finfo(d).eps)
            result.verification = job.verify(folder, coarsest, job.plan, job.quantized)
        result.files = sorted(file.name for file in folder.iterdir())
    result.layers.sort(key=lambda layer: (-layer.relative, layer.name))
    return result


def _fold_one(job: _Job, key: str, target: Target, dtype: torch.dtype, result: ExportReport) -> torch.Tensor:
    """One tensor of the output: read, made 4-bit and back if asked, folded, checked and measured."""
    weight = job.source.tensor(target.source)
    if target.requantize and job.quantized is not None:
        try:
            weight = job.quantized.round_trip(weight, transposed=target.transposed)
        except InvalidWeightError as error:
            raise InvalidWeightError(f"{key}: {error}") from None
    if target.full:
        keep = 1 - sum(w for w, _ in target.full)
        if len(target.full) == 1 and keep == 0:
            weight = target.full[0][1]
        else:
            weight = weight.double() * keep + sum(w * tensor.double() for w, tensor in target.full)
    if not target.terms:
        return weight.to(dtype)
    folded = fold(weight, target.terms, transposed=target.transposed, dtype=dtype)
    if not bool(torch.isfinite(folded).all()):
        raise CheckpointError(f"{key} would hold NaN or infinity as {dtype}: the base has it, or it is out of range.")
    if job.report:
        result.layers.append(measure(key, folded, weight, target.terms, transposed=target.transposed))
    return folded


def _written_specs(job: _Job) -> dict[str, TensorSpec]:
    """The base's tensors (and a head that is no longer tied), floating ones in `dtype`."""
    specs = dict(job.source.specs)
    for key, target in job.plan.targets.items():
        specs.setdefault(key, specs[target.source])
    if job.dtype is None:
        return specs
    return {k: TensorSpec(job.dtype, s.shape) if s.dtype.is_floating_point else s for k, s in specs.items()}


def _edit_config(file: Path, *, untie: bool, dtype: torch.dtype | None) -> None:
    if not file.is_file() or not (untie or dtype):
        return
    config = read_json(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if untie and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
            if dtype is not None:
                name = "torch_dtype" if "torch_dtype" in part else "dtype"
                part[name] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verifier(model: nn.Module | None, folder: Path | None, adapters: list[WeightedAdapter]) -> Callable[..., Any]:
    if folder is None:
        assert model is not None
        return lambda out, dtype, plan, quantized: verify_model(out, model, dtype)
    return lambda out, dtype, plan, quantized: verify_folder(
        out, folder, adapters, dtype, plan=plan, quantized=quantized
    )


def _check_choices(format: str, base_precision: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if format != "safetensors":
        raise ConfigError(f"Writing format={format!r} is not available yet; use format='safetensors'.")
    if base_precision not in BASE_PRECISIONS:
        raise ConfigError(f"base_precision must be one of {', '.join(BASE_PRECISIONS)}, got {base_precision!r}.")
