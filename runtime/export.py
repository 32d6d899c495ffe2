"""base + adapters -> one ordinary checkpoint, streamed tensor by tensor, each folded weight rounded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import parse_dtype
from ..errors import AdapterMismatchError, ConfigError
from .export_correction import Correction
from .export_gguf import check_gguf_output, gguf_type, write_gguf_export
from .export_inputs import Adapters, PathLike, check_not_an_input, dense_folder, lora_only, read_adapters
from .export_report import ExportReport
from .export_resume import fingerprint
from .export_sources import FolderSource, ModelSource, WeightSource, unwrap
from .export_write import ExportJob, Progress, write_export
from .fold_plan import FoldPlan, WeightedAdapter, plan_fold
from .formats.atomic import check_output_folder, check_output_name
from .formats.checkpoint_dir import parse_size
from .quantized_base import QuantizedBase, common_base, read_side_file
from .quantized_source import QuantizedFolderSource, is_quantized_folder
from .renamed_keys import renamed_keys
from .requantize import mark_requantized
from .verify import verify_folder, verify_model

FORMATS = ("safetensors", "nf4", "gguf")
BASE_PRECISIONS = ("original", "dequantized")


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
    resume: bool = False,
    correction_rank: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Fold adapters into a base and write a checkpoint that stock transformers loads.

    `model_or_dir` is a safetensors folder, a .gguf file, or a prepared model. `adapters` maps PEFT folders (or, for a
    model, names of its adapters) to weights; a list counts each as 1, None takes what is active on the model.
    `base_precision="original"` folds into the base's own values, "dequantized" into the 4-bit values that the adapter
    was trained on (`quant` overrides what the adapter's folder notes about them; a bitsandbytes folder as the base has
    them already). A prepared model holds no original
    values: name its folder as `base` for those. Each tensor keeps its dtype unless `dtype` is given.
    With `format="gguf"`, `out` is a .gguf file or a folder for one, and `dtype` its type: F32, F16, BF16 or Q8_0.

    `verify` compares logits with base + adapters (quantized, with format "nf4") before the result appears, `report`
    measures each layer's error, `progress(done_bytes, total_bytes)` is called after each tensor. `correction_rank` (with
    format "nf4") also writes `out`/correction, an adapter of that rank that takes back part of what requantizing lost.
    `resume=True` keeps what is finished when the run is killed, for the next one with `resume=True`. Two tensors are in
    memory, the one that is made and the one that is written, and `out` appears at the end, whole, or not at all.
    Raises ConfigError, CheckpointError, AdapterMismatchError, OutputError, ModelStateError (a model of PEFT's).
    """
    in_memory = base is None and isinstance(model_or_dir, nn.Module)
    out = Path(out)
    _check_choices(format, base_precision, correction_rank, out)
    if in_memory:
        _check_needs_no_folder(format, resume=resume, verify=verify)
    kind = gguf_type(dtype) if format == "gguf" else None
    out_dtype = None if dtype is None or kind is not None else parse_dtype(dtype)
    size = parse_size(max_shard_size)
    start = time.perf_counter()
    model = unwrap(model_or_dir) if isinstance(model_or_dir, nn.Module) else None
    folder = Path(base) if base is not None else (None if model else Path(model_or_dir))  # type: ignore[arg-type]
    weighted = read_adapters(model, adapters, allow_pickle, plain=folder is not None)
    check_not_an_input(out, [p for p in (folder, *(adapter.folder for adapter in weighted)) if p is not None])
    (check_gguf_output if format == "gguf" else check_output_folder)(out, overwrite=overwrite)
    if verify or format == "nf4":  # which read what they wrote
        check_output_name(out)
    output = _quantization_of(weighted, model, quant) if format == "nf4" else None
    options = [format, base_precision, dtype, size, report, quant, correction_rank, repr(output)]
    mark = fingerprint(folder, weighted, options) if resume and folder is not None else None
    with dense_folder(folder) as dense:
        job = ExportJob(
            *_plan(model, dense, weighted, base_precision, quant),
            format=format,
            output=output,
            gguf_type=kind,
            dtype=out_dtype,
            max_shard_size_bytes=size,
            report=report,
            progress=progress,
            verify=_verifier(model, dense, weighted) if verify else None,
            mark=mark,
            correction=None if correction_rank is None else Correction(correction_rank),
        )
        result = (write_gguf_export if format == "gguf" else write_export)(job, out, overwrite)
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
        return source, plan_fold(source.specs, source.config, loras, model=model), loras, base_precision, None
    quantized_base = base_precision == "dequantized" and is_quantized_folder(folder)
    source = QuantizedFolderSource(folder) if quantized_base else FolderSource(folder)
    plan, renamed = _match(source, adapters)
    if base_precision == "original" or quantized_base:
        return source, plan, adapters, base_precision, None
    quantized = _quantization_of(adapters, model, quant)
    if quantized.init_lora_weights is not None:
        raise ConfigError(
            f"init_lora_weights={quantized.init_lora_weights!r} changed the 4-bit base that the adapter was trained on: "
            "export the prepared model itself, or with base_precision='original'."
        )
    mark_requantized(plan, source.specs, quantized.weights, quantized.transposed, source.config, renamed)
    return source, plan, adapters, base_precision, quantized


def _match(source: WeightSource, adapters: list[WeightedAdapter]) -> tuple[FoldPlan, dict[str, str]]:
    """The plan, and the names that the base has for what the model calls otherwise, where the plan needed them."""
    try:
        return plan_fold(source.specs, source.config, adapters), {}
    except AdapterMismatchError:
        renamed = renamed_keys(source.config, source.specs)
        if not renamed:
            raise
        return plan_fold(source.specs, source.config, adapters, renamed), renamed


def _quantization_of(
    adapters: list[WeightedAdapter], model: nn.Module | None, quant: Mapping[str, Any] | None
) -> QuantizedBase:
    """`quant` if given, else what the model has, else what the adapters' folders note, else the default."""
    if quant is not None:
        return QuantizedBase.from_dict(quant)
    if model is not None:
        return QuantizedBase.of_model(model)
    return common_base(read_side_file(a.folder) for a in adapters if a.folder is not None)


def _verifier(model: nn.Module | None, folder: Path | None, adapters: list[WeightedAdapter]) -> Callable[..., Any]:
    if folder is None:
        assert model is not None
        return lambda out, eps, plan, quantized, four_bit: verify_model(out, model, eps)
    return lambda out, eps, plan, quantized, four_bit: verify_folder(
        out, folder, adapters, eps, plan=plan, quantized=quantized, four_bit=four_bit
    )


def _check_choices(format: str, base_precision: str, correction_rank: int | None, out: Path) -> None:
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if format != "gguf" and out.suffix.lower() == ".gguf":
        raise ConfigError(
            f"{out} names a GGUF file, but format is {format!r}: give format='gguf', or a folder as output."
        )
    if base_precision not in BASE_PRECISIONS:
        raise ConfigError(f"base_precision must be one of {', '.join(BASE_PRECISIONS)}, got {base_precision!r}.")
    if correction_rank is not None and (format != "nf4" or correction_rank < 1):
        raise ConfigError(f"correction_rank is a rank of at least 1, for format='nf4', got {correction_rank}.")


def _check_needs_no_folder(format: str, *, resume: bool, verify: bool) -> None:
    """Raise ConfigError where a base that is in memory only cannot give what is asked."""
    if resume:
        raise ConfigError("resume needs a base in a folder: name it with base=...")
    if verify and format == "nf4":
        raise ConfigError("With format='nf4', verify needs a base in a folder: name it with base=...")
