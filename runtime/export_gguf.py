"""The GGUF output of an export: each tensor folded, rounded once to the file's type, measured and written."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError, ConfigError
from ..tensor import is_finite
from .described_model import full_config
from .export_report import ExportReport
from .export_resume import note_layers, noted_layers, read_note, resumable_folder
from .export_write import ExportJob, start_of, written_specs
from .fold import fold, measure
from .formats.atomic import check_output_file, check_output_folder, new_file, new_folder, sync
from .formats.checkpoint_dir import TensorSpec
from .formats.gguf_files import DTYPES, TYPES, GgufTensor, architecture_of, plan_tensors, write_gguf

FILE_NAME = "model.gguf"
NOTE_EVERY_BYTES = 256 * 2**20  # of a resumable export: what a kill can cost
# What rounding to Q8_0 does to logits, as a unit of `verify`'s tolerance: half a step of a block of 32 normal values
# (their largest / 127 / 2) is three times bfloat16's half unit, both in 2-norms.
Q8_0_EPS = 3 * torch.finfo(torch.bfloat16).eps


def gguf_type(dtype: str | torch.dtype | None) -> str | None:
    """The `dtype` of an export to GGUF -> the type of its matrices; None: as the base has them. Raises ConfigError."""
    if dtype is None:
        return None
    short = {"BFLOAT16": "BF16", "FLOAT16": "F16", "HALF": "F16", "FP16": "F16", "FLOAT32": "F32", "FP32": "F32"}
    text = str(dtype).removeprefix("torch.").upper()
    found = short.get(text, text)
    if found not in TYPES:
        raise ConfigError(f"dtype must be one of {', '.join(TYPES)} for format='gguf', got {dtype!r}.")
    return found


def check_gguf_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless `out`, a .gguf file or a folder for one, may be written."""
    check = check_output_file if _is_file(out) else check_output_folder
    check(out, overwrite=overwrite)


def write_gguf_export(job: ExportJob, out: Path, overwrite: bool) -> ExportReport:
    """Write `out`, a .gguf file or a folder with model.gguf, whole or not at all.

    Raises ConfigError (an architecture that is not written), CheckpointError, MissingDependencyError, OutputError.
    """
    specs = {key: spec for key, spec in written_specs(job).items() if not _is_tied_copy(job, key)}
    kind = job.gguf_type or _type_of_base(specs)
    architecture_of(job.source.config)  # another one is refused by name, not for its options
    config = full_config(job.source.config)
    tensors = plan_tensors(config, specs, kind)
    result = ExportReport(out, job.format, job.base_precision, {a.label: a.weight for a in job.adapters})
    result.folded = len(job.plan.targets)
    result.copied = len(tensors) - result.folded
    result.total_bytes = sum(tensor.nbytes for tensor in tensors)
    with _new_gguf(job, out, overwrite) as file, tempfile.TemporaryDirectory(prefix="qlora-compile-") as side_files:
        job.source.write_side_files(Path(side_files))
        start = _noted_start(file, result)
        steps = _Steps(job, result, file.parent, start[1], sum(tensor.nbytes for tensor in tensors[: start[0]]))
        write_gguf(file, Path(side_files), config, tensors, kind, steps.produce, start, steps.written)
        if job.verify is not None:
            eps = Q8_0_EPS if kind == "Q8_0" else torch.finfo(DTYPES[kind]).eps
            result.verification = job.verify(file, eps, job.plan, job.quantized, None)
        result.files = [file.name]
    result.layers.sort(key=lambda layer: (-layer.relative, layer.name))
    return result


@dataclass
class _Steps:
    """What happens with each tensor: it is made, counted, and from time to time noted as finished (`end_bytes`)."""

    job: ExportJob
    result: ExportReport
    folder: Path
    end_bytes: int
    done_bytes: int

    def produce(self, tensor: GgufTensor) -> Any:
        stored = _stored(self.job, tensor, self.result)
        self.done_bytes += tensor.nbytes
        if self.job.progress is not None:
            self.job.progress(self.done_bytes, self.result.total_bytes)
        return stored

    def written(self, count: int, stream: IO[bytes]) -> None:
        if self.job.mark is not None and stream.tell() >= self.end_bytes + NOTE_EVERY_BYTES:
            stream.flush()
            sync(stream.fileno())
            self.end_bytes = stream.tell()
            note_layers(self.folder, self.result.layers, tensors=count, end=self.end_bytes)


def _noted_start(file: Path, result: ExportReport) -> tuple[int, int]:
    """(tensors, bytes) of `file` that a killed export has finished; their errors go into the report."""
    found = read_note(file.parent)
    if not found.get("tensors") or not file.is_file() or file.stat().st_size < found["end"]:
        return 0, 0
    result.layers += noted_layers(file.parent)
    return found["tensors"], found["end"]


@contextlib.contextmanager
def _new_gguf(job: ExportJob, out: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write the file, which becomes `out` (or `out`/model.gguf) when the block ends without an error."""
    name = out.name if _is_file(out) else FILE_NAME
    if job.mark is not None:
        single = name if _is_file(out) else None
        with resumable_folder(out, job.mark, overwrite=overwrite, file=single) as folder:
            yield folder / name
    elif _is_file(out):
        with new_file(out, overwrite=overwrite, durable=False) as file:
            yield file
    else:
        with new_folder(out, overwrite=overwrite, durable=False) as folder:
            yield folder / name


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".gguf"


def _stored(job: ExportJob, tensor: GgufTensor, result: ExportReport) -> Any:
    """The array to store for one tensor: the exact sum, rounded once to 16 bits, or to fp32 and then to Q8_0."""
    target = job.plan.targets.get(tensor.key)
    weight = job.source.tensor(tensor.key) if target is None else start_of(job, tensor.key, target)
    terms, options = (target.terms, target.fold_options) if target else ([], {})
    values = fold(weight, terms, dtype=tensor.dtype, **options) if terms else weight.to(tensor.dtype)
    if not is_finite(values):
        raise CheckpointError(f"{tensor.key} would hold NaN or infinity as {tensor.kind}; another dtype may hold it.")
    stored = tensor.encode(values)
    if job.report and len(tensor.shape) > 1:
        result.layers.append(measure(tensor.key, tensor.decode(stored), weight, terms, **options))
    return stored


def _type_of_base(specs: Mapping[str, TensorSpec]) -> str:
    """The type that holds every matrix of the base."""
    found = {spec.dtype for spec in specs.values() if len(spec.shape) > 1}
    return next((kind for kind, dtype in DTYPES.items() if found == {dtype}), "F32")


def _is_tied_copy(job: ExportJob, key: str) -> bool:
    """A stored head that transformers does not read, because the config ties it to the embedding."""
    return key == "lm_head.weight" and bool(job.source.config.get("tie_word_embeddings")) and not job.plan.untie
