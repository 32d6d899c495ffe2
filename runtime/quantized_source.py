"""A bitsandbytes 4-bit folder as the base of an export: each weight is read dequantized, as its codes say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..config import COMPUTE_DTYPES
from ..errors import CheckpointError
from .export_nf4 import linear_weights
from .formats.bnb_files import PARTS, quantized_keys, read_state, unpack_weight
from .formats.checkpoint_dir import TensorSpec, copy_side_files, open_checkpoint, read_json


class QuantizedFolderSource:
    """A folder that bitsandbytes (or `export(format="nf4")`) wrote, seen as a dense one.

    Raises CheckpointError for a folder that is broken, not quantized, or quantized by another method.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)
        config = self.checkpoint.config()
        quantized = config.pop("quantization_config", None)
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "nothing"
        self._states = quantized_keys(self.checkpoint.specs)
        if method != "bitsandbytes" or not self._states:
            raise CheckpointError(f"{path} is quantized by {method}; only bitsandbytes' 4-bit folders are read.")
        self.config: dict[str, Any] = config
        parts = {f"{key}.{part}" for key in self._states for part in PARTS}
        self.specs = {key: self._spec(key) for key in self.checkpoint.specs if key not in parts}
        self._transposed = self._conv1d_keys()
        for key in self._transposed:
            spec = self.specs[key]
            self.specs[key] = TensorSpec(spec.dtype, spec.shape[::-1])

    def tensor(self, key: str) -> torch.Tensor:
        if key not in self._states:
            return self.checkpoint.tensor(key)
        names = [key, *(name for part in PARTS if (name := f"{key}.{part}") in self.checkpoint.specs)]
        tensors = {name: self.checkpoint.tensor(name) for name in names}
        return unpack_weight(key, tensors, transposed=key in self._transposed).dequantize()

    def write_side_files(self, folder: Path) -> None:
        copy_side_files(self.checkpoint.path, folder)
        config = read_json(folder / "config.json")
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _spec(self, key: str) -> TensorSpec:
        if key not in self._states:
            return self.checkpoint.specs[key]
        state = read_state(key, self.checkpoint.tensor(self._states[key]))
        return TensorSpec(COMPUTE_DTYPES[state["dtype"]], tuple(state["shape"]))

    def _conv1d_keys(self) -> set[str]:
        """The weights that the model holds as [in, out] and bitsandbytes' file as [out, in]."""
        keys, _ = linear_weights(self.checkpoint.config(), self.specs)
        return {key for key, linear in keys.items() if linear.is_conv1d and key in self._states}


def is_quantized_folder(path: Path) -> bool:
    """Whether the folder's config.json names a quantization."""
    file = path / "config.json"
    return file.is_file() and bool(read_json(file).get("quantization_config"))
