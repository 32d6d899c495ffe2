"""Where an export reads its base from: a safetensors folder, or a prepared model in memory. Both by the tensor."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import CheckpointError, ModelStateError
from ..foreign import is_bnb_weight, is_peft_model
from ..modules import adapter_parameters
from ..tensor import QuantizedTensor
from .formats.checkpoint_dir import DTYPE_NAMES, TensorSpec, copy_side_files, open_checkpoint


class WeightSource(Protocol):
    """Names, dtypes and shapes of the base's tensors; each tensor when asked; and the files that go with them."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    def tensor(self, key: str) -> torch.Tensor:
        """The dense tensor, on the CPU; not to be written to."""
        ...

    def write_side_files(self, folder: Path) -> None:
        """Config, tokenizer, generation config and so on."""
        ...


class FolderSource:
    """A safetensors folder. Raises CheckpointError for a broken one, and for one that is already quantized."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)
        self.specs = self.checkpoint.specs
        self.config = self.checkpoint.config()
        quantized = self.config.get("quantization_config")
        if quantized:
            method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
            raise CheckpointError(
                f"{path} is already quantized ({method}); fold into the original 16-bit checkpoint instead, "
                "or into the 4-bit values with base_precision='dequantized'."
            )

    def tensor(self, key: str) -> torch.Tensor:
        return self.checkpoint.tensor(key)

    def write_side_files(self, folder: Path) -> None:
        copy_side_files(self.checkpoint.path, folder)


class ModelSource:
    """A model in memory, without its adapters: 4-bit weights are read dequantized, tied tensors under one name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        if any(is_bnb_weight(parameter) for parameter in self.model.parameters()):
            raise CheckpointError(
                "The model's weights are in bitsandbytes' 4 bits: save_pretrained it, and export the folder with "
                "base_precision='dequantized'."
            )
        config: Any = getattr(self.model, "config", None)
        self.config: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
        self._tensors = _plain_state(self.model)
        self.specs = {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in sorted(self._tensors.items())}
        for key, spec in self.specs.items():
            if spec.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{key} is {spec.dtype}, which safetensors cannot hold.")

    def tensor(self, key: str) -> torch.Tensor:
        tensor = self._tensors[key].detach()
        return (tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor).cpu()

    def write_side_files(self, folder: Path) -> None:
        config: Any = copy.deepcopy(getattr(self.model, "config", None))
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(self.model).__name__]  # as PreTrainedModel.save_pretrained notes it
            config.save_pretrained(folder)
        generation: Any = getattr(self.model, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(folder)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile` and DistributedDataParallel, whose names have no extra prefix."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_not_peft(model: nn.Module) -> None:
    """Raises ModelStateError for a model that has PEFT's adapters, compiled with this backend or not."""
    if is_peft_model(model):
        raise ModelStateError(
            "The adapters of this model are PEFT's, which are not changed or exported from here: "
            'model.save_pretrained("adapter") writes them, and qlora_compile.export(base_folder, out, adapters="adapter") '
            "folds them."
        )


def _plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state without adapters; of tensors that are one parameter, the first name only."""
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        key: tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and id(tensor) not in adapters and first.get(id(tensor), key) == key
    }
