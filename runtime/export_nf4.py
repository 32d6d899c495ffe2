"""The 4-bit output of an export: which weights become 4-bit, and their tensors, each quantized once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from ..errors import CheckpointError, ConfigError, MissingDependencyError
from ..tensor import QuantizedTensor
from .described_model import described_model
from .fold import LayerError
from .fold_plan import resolve_key
from .formats.atomic import write_file
from .formats.bnb_files import pack_weight
from .formats.checkpoint_dir import Checkpoint, TensorSpec, open_checkpoint
from .formats.peft_files import PREFIX

Produce = Callable[[str], torch.Tensor]
PARTS_FOLDER = ".parts"  # of the output, until it is finished


@dataclass(frozen=True)
class LinearWeight:
    """A weight that becomes 4-bit: its parameter's name in the model, and whether it is stored as [in, out] (Conv1D)."""

    name: str
    is_conv1d: bool


def linear_weights(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], renamed: Mapping[str, str] | None = None
) -> tuple[dict[str, LinearWeight], list[str]]:
    """What transformers would turn into 4-bit linears, by key -> (them, names of the linears that stay dense).

    `config` is the folder's config.json, `renamed` as for `resolve_key`. The output head stays dense, as bitsandbytes'
    users have it, and so does the last layer of any other model.
    Raises MissingDependencyError, CheckpointError (no such architecture), ConfigError (nothing to quantize).
    """
    try:
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        purpose = "Telling which weights become 4-bit"
        raise MissingDependencyError("transformers", "transformers", purpose) from None
    model: Any = described_model(config)
    if model is None:
        raise CheckpointError(
            f"config.json names the architecture {config.get('architectures')}, which transformers cannot build."
        )
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear}
    head = model.get_output_embeddings()
    last = list(model.state_dict())[-1].rpartition(".")[0]
    dense = [name for name, module in linears.items() if module is head or name == last]
    skipped = [*dense, *(model._keep_in_fp32_modules or ())]
    keys = {
        key: LinearWeight(f"{name}.weight", isinstance(module, Conv1D))
        for name, module in linears.items()
        if should_convert_module(name, skipped) and (key := resolve_key(f"{name}.weight", specs, renamed))
    }
    if not keys:
        raise ConfigError("There is nothing to quantize: the model has no linear layer besides its output head.")
    return keys, dense


@dataclass(frozen=True)
class Findings:
    """What was measured of one 4-bit weight: its error; with a correction also the error with it, and its factors."""

    layer: LayerError | None = None
    corrected: LayerError | None = None
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def quantized_tensors(
    keys: Mapping[str, LinearWeight],
    specs: Mapping[str, TensorSpec],
    quantize: Callable[[str, LinearWeight], tuple[QuantizedTensor, Findings]],
    found: Callable[[str, Findings], None],
    dense: Produce,
    folder: Path,
    *,
    resumable: bool,
) -> Iterator[tuple[dict[str, TensorSpec], Produce]]:
    """Quantize each of `keys` once into files in `folder` -> (specs to write, where to get each tensor).

    The header of a safetensors file comes before its tensors and needs their sizes, one of which (the JSON) depends on
    the values; so the parts wait on the disk rather than in memory, and are gone at the end. With `resumable` those that
    are there already are kept. `found` is called for each weight, kept or new.
    """
    out = {key: spec for key, spec in specs.items() if key not in keys}
    parts: dict[str, Checkpoint] = {}
    with _parts_folder(folder) as place:
        for number, (key, linear) in enumerate(sorted(keys.items())):
            file = place / f"{number}.safetensors"
            if resumable and file.is_file():
                findings = _read_findings(open_checkpoint(file))
            else:
                quantized, findings = quantize(key, linear)
                data = _part(pack_weight(key, quantized, specs[key].dtype), findings)
                write_file(file, data) if resumable else file.write_bytes(data)
            found(key, findings)
            checkpoint = open_checkpoint(file)
            parts |= {name: checkpoint for name in checkpoint.specs if name not in findings.factors}
            checkpoint.close()
        out |= {name: checkpoint.specs[name] for name, checkpoint in parts.items()}

        def produce(name: str) -> torch.Tensor:
            if name not in parts:
                return dense(name)
            tensor = parts[name].tensor(name)
            parts[name].close()
            return tensor

        yield out, produce


@contextmanager
def _parts_folder(folder: Path) -> Iterator[Path]:
    place = folder / PARTS_FOLDER
    place.mkdir(exist_ok=True)
    yield place
    shutil.rmtree(place)  # not after an error: the next run goes on from it


def _part(tensors: Mapping[str, torch.Tensor], findings: Findings) -> bytes:
    """A safetensors file of a 4-bit weight's tensors and the correction's factors, with the errors in its header."""
    errors = {"layer": findings.layer, "corrected": findings.corrected}
    noted = {name: json.dumps(error.to_dict()) for name, error in errors.items() if error is not None}
    plain = {name: tensor.contiguous() for name, tensor in {**tensors, **findings.factors}.items()}
    return save(plain, metadata=noted)


def _read_findings(part: Checkpoint) -> Findings:
    noted = part.metadata()
    errors = {name: LayerError(**json.loads(noted[name])) for name in ("layer", "corrected") if name in noted}
    factors = {name: part.tensor(name).clone() for name in part.specs if name.startswith(PREFIX)}
    return Findings(errors.get("layer"), errors.get("corrected"), factors)
