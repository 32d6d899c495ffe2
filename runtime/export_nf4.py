"""The 4-bit output of an export: which weights become 4-bit, and their tensors, each quantized once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError, ConfigError, MissingDependencyError
from ..tensor import QuantizedTensor
from .fold_plan import resolve_key
from .formats.bnb_files import pack_weight
from .formats.checkpoint_dir import Checkpoint, TensorSpec, open_checkpoint

Produce = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class LinearWeight:
    """A weight that becomes 4-bit: its parameter's name in the model, and whether it is stored as [in, out] (Conv1D)."""

    name: str
    is_conv1d: bool


def linear_weights(config_folder: Path, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, LinearWeight], list[str]]:
    """What transformers would turn into 4-bit linears, by key -> (them, names of the linears that stay dense).

    The output head stays dense, as bitsandbytes' users have it, and so does the last layer of any other model.
    Raises MissingDependencyError, CheckpointError (no such architecture), ConfigError (nothing to quantize).
    """
    try:
        import transformers
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        raise MissingDependencyError("transformers", "transformers", "Writing format='nf4'") from None
    config = transformers.AutoConfig.from_pretrained(str(config_folder), local_files_only=True)
    cls = getattr(transformers, (config.architectures or ["?"])[0], None)
    if cls is None:
        raise CheckpointError(f"config.json names the architecture {config.architectures}, unknown to transformers.")
    with torch.device("meta"):
        model = cls(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Conv1D) or type(m) is nn.Linear}
    head = model.get_output_embeddings()
    last = list(model.state_dict())[-1].rpartition(".")[0]
    dense = [name for name, module in linears.items() if module is head or name == last]
    skipped = [*dense, *(model._keep_in_fp32_modules or ())]
    keys = {
        key: LinearWeight(f"{name}.weight", isinstance(module, Conv1D))
        for name, module in linears.items()
        if should_convert_module(name, skipped) and (key := resolve_key(f"{name}.weight", specs)) is not None
    }
    if not keys:
        raise ConfigError("format='nf4' has nothing to do: the model has no linear layer besides its output head.")
    return keys, dense


@contextmanager
def quantized_tensors(
    keys: Mapping[str, LinearWeight],
    specs: Mapping[str, TensorSpec],
    quantize: Callable[[str, LinearWeight], QuantizedTensor],
    dense: Produce,
    beside: Path,
) -> Iterator[tuple[dict[str, TensorSpec], Produce]]:
    """Quantize each of `keys` once into files beside the output -> (specs to write, where to get each tensor).

    The header of a safetensors file comes before its tensors and needs their sizes, one of which (the JSON) depends on
    the values; so the parts wait on the disk rather than in memory, and are gone at the end.
    """
    out = {key: spec for key, spec in specs.items() if key not in keys}
    parts: dict[str, Checkpoint] = {}
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}.parts.", dir=beside.parent) as temporary:
        for number, (key, linear) in enumerate(sorted(keys.items())):
            file = Path(temporary) / f"{number}.safetensors"
            save_file(pack_weight(key, quantize(key, linear), specs[key].dtype), file)
            parts |= dict.fromkeys((checkpoint := open_checkpoint(file)).specs, checkpoint)
            checkpoint.close()
        out |= {name: checkpoint.specs[name] for name, checkpoint in parts.items()}

        def produce(name: str) -> torch.Tensor:
            if name not in parts:
                return dense(name)
            tensor = parts[name].tensor(name)
            parts[name].close()
            return tensor

        yield out, produce
