"""Writing an export: the job that `export` has planned, run tensor by tensor into a temporary folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InvalidWeightError
from ..tensor import QuantizedTensor, is_finite
from .expert_layout import ExpertRows
from .export_correction import Correction
from .export_nf4 import PARTS_FOLDER, Findings, LinearWeight, Produce, linear_weights, quantized_tensors
from .export_report import ExportReport
from .export_resume import NOTE, note_layers, noted_layers, resumable_folder
from .export_sources import WeightSource
from .fold import fold, measure
from .fold_plan import FoldPlan, Target, WeightedAdapter, resolve_key
from .formats.atomic import new_folder
from .formats.bnb_files import quantization_config
from .formats.checkpoint_dir import TensorSpec, read_json, write_checkpoint
from .quantized_base import QuantizedBase
from .verify import FourBit, VerifyResult

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportJob:
    """Everything that is fixed before the first tensor is written.

    `quantized` says how targets marked `requantize` are made 4-bit and back before folding, `output` how the result is
    quantized (format "nf4"), `gguf_type` the type of a GGUF file's matrices (None: as the base has them). `verify` gets
    what was written, the epsilon of its coarsest rounding, the plan, `quantized` and what of it is in 4 bits.
    """

    source: WeightSource
    plan: FoldPlan
    adapters: list[WeightedAdapter]
    base_precision: str
    quantized: QuantizedBase | None
    format: str
    output: QuantizedBase | None
    gguf_type: str | None
    dtype: torch.dtype | None
    max_shard_size_bytes: int
    report: bool
    progress: Progress | None
    verify: Callable[[Path, float, FoldPlan, QuantizedBase | None, FourBit | None], VerifyResult] | None
    mark: str | None = None  # of a resumable export
    correction: Correction | None = None  # of a 4-bit output


def write_export(job: ExportJob, out: Path, overwrite: bool) -> ExportReport:
    """Write `out`, whole or not at all. Raises CheckpointError, InvalidWeightError, OutputError."""
    specs = written_specs(job)
    result = ExportReport(out, job.format, job.base_precision, {a.label: a.weight for a in job.adapters})
    result.folded, result.copied = len(job.plan.targets), len(specs) - len(job.plan.targets)
    place = new_folder(out, overwrite=overwrite, durable=False)
    if job.mark is not None:
        place = resumable_folder(out, job.mark, overwrite=overwrite)
    with place as folder, contextlib.ExitStack() as stack:
        counted = _Counted(specs, job.progress)
        job.source.write_side_files(folder)
        # `produce` is called by the writer, once a tensor, in the order of the files.
        specs_out, produce, changes, four_bit = _outputs(job, specs, folder, result, counted, stack)
        _edit_config(folder / "config.json", changes)
        result.total_bytes = sum(spec.nbytes for spec in specs_out.values())
        shard_done = None if job.mark is None else _shard_keeper(folder, result, counted)
        write_checkpoint(folder, specs_out, counted.counting(produce), job.max_shard_size_bytes, shard_done)
        if job.correction is not None:
            job.correction.write(folder)
            result.corrected = sorted(job.correction.layers, key=lambda layer: (-layer.relative, layer.name))
        if job.verify is not None:
            rounded = [specs[key].dtype for key in job.plan.targets] or [torch.float32]
            coarsest_eps = max(torch.finfo(dtype).eps for dtype in rounded)
            result.verification = job.verify(folder, coarsest_eps, job.plan, job.quantized, four_bit)
        result.files = sorted(file.name for file in folder.iterdir() if file.name not in (NOTE, PARTS_FOLDER))
    result.layers.sort(key=lambda layer: (-layer.relative, layer.name))
    return result


def _outputs(
    job: ExportJob,
    specs: Mapping[str, TensorSpec],
    folder: Path,
    result: ExportReport,
    counted: _Counted,
    stack: contextlib.ExitStack,
) -> tuple[Mapping[str, TensorSpec], Produce, dict[str, Any], FourBit | None]:
    """(what to write, where to get each tensor, changes of config.json, what of it is in 4 bits)."""
    changes = _config_changes(job)

    def dense(key: str) -> torch.Tensor:
        target = job.plan.targets.get(key)
        if target is None:
            return _rounded(key, job.source.tensor(key), specs[key].dtype)
        return _fold_one(job, key, target, specs[key].dtype, result)

    def quantize(key: str, linear: LinearWeight) -> tuple[QuantizedTensor, Findings]:
        return _quantize_one(job, key, specs[key].dtype, linear)

    def found(key: str, findings: Findings) -> None:
        result.layers += [] if findings.layer is None else [findings.layer]
        if findings.corrected is not None and job.correction is not None:
            job.correction.take(findings.corrected, findings.factors)
        counted.count(key)

    if job.output is None:
        return specs, dense, changes, None
    keys, kept = linear_weights(read_json(folder / "config.json"), specs)
    result.quantized, result.copied = len(keys), len(set(specs) - set(keys) - set(job.plan.targets))
    changes["quantization_config"] = quantization_config(job.output.quant_type, job.output.double_quant, kept)
    parts = quantized_tensors(keys, specs, quantize, found, dense, folder, resumable=job.mark is not None)
    return *stack.enter_context(parts), changes, FourBit(tuple(keys.values()), job.output)


class _Counted:
    """Tells `progress` how many of the bytes of `specs` are done. Names that are not in `specs` count nothing."""

    def __init__(self, specs: Mapping[str, TensorSpec], progress: Progress | None) -> None:
        self.left, self.progress = dict(specs), progress
        self.total_bytes, self.done_bytes = sum(spec.nbytes for spec in specs.values()), 0

    def counting(self, produce: Produce) -> Produce:
        def counted(key: str) -> torch.Tensor:
            tensor = produce(key)
            self.count(key)
            return tensor

        return counted

    def count(self, key: str) -> None:
        if key not in self.left:
            return
        self.done_bytes += self.left.pop(key).nbytes
        if self.progress is not None:
            self.progress(self.done_bytes, self.total_bytes)


def _shard_keeper(folder: Path, result: ExportReport, counted: _Counted) -> Callable[[list[str], bool], None]:
    """What happens after each shard of a resumable export: its errors are noted; of one that is kept, they are read."""
    noted = {layer.name: layer for layer in noted_layers(folder)}
    for layer in result.layers:  # of 4-bit weights, which are kept beside the shards
        noted.pop(layer.name, None)

    def shard_done(keys: list[str], was_written: bool) -> None:
        if was_written:
            note_layers(folder, result.layers)
            return
        for key in keys:
            counted.count(key)
            result.layers += [noted[key]] if key in noted else []

    return shard_done


def start_of(job: ExportJob, key: str, target: Target) -> torch.Tensor:
    """What the terms are added to: the base's tensor, made 4-bit and back if asked, or what was trained in full."""
    weight = job.source.tensor(target.source)
    if target.requantize and job.quantized is not None:
        try:
            if target.expert is not None:
                weight = _expert_round_trip(job.source, target.expert, job.quantized)
            else:
                weight = job.quantized.round_trip(weight, transposed=target.transposed)
        except InvalidWeightError as error:
            raise InvalidWeightError(f"{key}: {error}") from None
    if target.full:
        keep = 1 - sum(w for w, _ in target.full)
        if len(target.full) == 1 and keep == 0:
            weight = target.full[0][1]
        else:
            weight = weight.double() * keep + sum(w * tensor.double() for w, tensor in target.full)
    if target.bias:
        weight = weight.double() + sum(scale * vector.double() for scale, vector in target.bias)
    return weight


def _expert_round_trip(source: WeightSource, held: ExpertRows, quantized: QuantizedBase) -> torch.Tensor:
    """Whole matrices, put together as the model has them, made 4-bit and back -> this tensor's rows of them."""
    parts: dict[str, torch.Tensor] = {}
    for key, _, flip in held.siblings:
        tensor = source.tensor(resolve_key(key, source.specs) or key)
        parts[key] = tensor.mT if flip else tensor
    first = next(iter(parts.values()))
    out = sum(part.shape[-2] for part in parts.values())
    whole = first.new_empty(*first.shape[:-2], out, first.shape[-1])
    for key, rows, _ in held.siblings:
        whole[..., rows, :] = parts[key]
    done = quantized.round_trip(whole.mT.contiguous() if held.fused_transposed else whole, transposed=False)
    own = (done.mT if held.fused_transposed else done)[..., held.rows, :]
    return own.mT.contiguous() if held.transposed else own


def _fold_one(job: ExportJob, key: str, target: Target, dtype: torch.dtype, result: ExportReport) -> torch.Tensor:
    """One dense tensor of the output: folded, checked and measured."""
    weight = start_of(job, key, target)
    if not target.terms:
        return _rounded(key, weight, dtype)
    folded = fold(weight, target.terms, dtype=dtype, **target.fold_options)
    _check_finite(key, folded)
    if job.report:
        result.layers.append(measure(key, folded, weight, target.terms, **target.fold_options))
    return folded


def _rounded(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`; what is not finite already may be copied as it is, but not come out of rounding."""
    rounded = tensor.to(dtype)
    floating = dtype.is_floating_point and tensor.is_floating_point()
    if floating and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        _check_finite(key, rounded)
    return rounded


def _check_finite(key: str, tensor: torch.Tensor) -> None:
    if not is_finite(tensor):
        raise CheckpointError(
            f"{key} would hold NaN or infinity as {tensor.dtype}: the base has it, or it is out of range of this dtype."
        )


def _quantize_one(
    job: ExportJob, key: str, dtype: torch.dtype, linear: LinearWeight
) -> tuple[QuantizedTensor, Findings]:
    """One 4-bit tensor of the output, quantized from the fp32 sum (without an adapter: from what is stored)."""
    assert job.output is not None
    target = job.plan.targets.get(key)
    weight = job.source.tensor(key).to(dtype) if target is None else start_of(job, key, target)
    terms = target.terms if target else []
    options = target.fold_options if target else {"transposed": linear.is_conv1d}
    dense = fold(weight, terms, dtype=torch.float32, **options) if terms else weight.to(dtype)
    try:
        quantized = job.output.quantize(dense, transposed=linear.is_conv1d)
    except InvalidWeightError as error:
        raise InvalidWeightError(f"{key}: {error}") from None
    layer = measure(key, quantized.dequantize(), weight, terms, **options) if job.report else None
    if job.correction is None:
        return quantized, Findings(layer)
    return quantized, Findings(layer, *job.correction.of(linear.name, quantized, weight, terms, dense))


def written_specs(job: ExportJob) -> dict[str, TensorSpec]:
    """The base's tensors (and a head that is no longer tied), floating ones in `dtype`."""
    specs = dict(job.source.specs)
    for key, target in job.plan.targets.items():
        specs.setdefault(key, specs[target.source])
    if job.dtype is None:
        return specs
    return {k: TensorSpec(job.dtype, s.shape) if s.dtype.is_floating_point else s for k, s in specs.items()}


def _config_changes(job: ExportJob) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if job.plan.untie:
        changes["tie_word_embeddings"] = False
    if job.dtype is not None:
        changes["dtype"] = str(job.dtype).removeprefix("torch.")
    return changes


def _edit_config(file: Path, changes: Mapping[str, Any]) -> None:
    """Write `changes` into config.json, and into the text model's part of it where that says the same things."""
    if not file.is_file() or not changes:
        return
    config = read_json(file)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for name, value in changes.items():
                old_name = "torch_dtype" if name == "dtype" and "torch_dtype" in part else name
                if part is config or old_name in part:
                    part[old_name] = value
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
