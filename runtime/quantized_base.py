"""What the base looked like to the adapter that was trained on it: the side file of an adapter, and its use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import parse_dtype
from ..errors import CheckpointError, ConfigError, UnknownOptionError
from ..initialization import is_spectral
from ..modules import prepared_config
from ..nf4 import BLOCK_SIZES, CODE_BOOKS
from ..sharding import stored_form
from ..tensor import QuantizedTensor, quantize_4bit
from .formats.checkpoint_dir import read_json

SIDE_FILE = "qlora_compile.json"


@dataclass(frozen=True)
class QuantizedBase:
    """How a base was quantized. `save_adapter` notes it beside the adapter, stock peft ignores it.

    `weights` are the parameters that were quantized, None where nobody noted it (then: what bitsandbytes makes 4-bit);
    `transposed` those whose codes are of `W.t()` (Conv1D); `dtype` the dense dtype that they stand for (None: the
    checkpoint's own). `init_lora_weights` is set where it took the adapter's start out of the base (PiSSA and others).
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dtype: torch.dtype | None = None
    weights: tuple[str, ...] | None = None
    transposed: tuple[str, ...] = ()
    init_lora_weights: str | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> QuantizedBase:
        """What the model's QuantizedTensors say; `weights=()` where it has none."""
        found = {name: form for name, p in model.named_parameters() if (form := stored_form(p)) is not None}
        if not found:
            return cls(weights=())
        first = next(iter(found.values()))  # one configuration prepared them all; only their dtypes can differ
        dtypes = {weight.dtype for weight in found.values()}
        config = prepared_config(model)
        init = config.init_lora_weights if config else None
        return cls(
            first.quant_type,
            first.block_size,
            first.double_quant,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            weights=tuple(sorted(found)),
            transposed=tuple(sorted(name for name, weight in found.items() if weight.transposed)),
            init_lora_weights=str(init) if is_spectral(init) else None,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizedBase:
        """Raises UnknownOptionError, ConfigError."""
        known = cls.__dataclass_fields__
        for name in values:
            if name not in known:
                raise UnknownOptionError(name, known, "quantization option")
        out = dict(values)
        if out.get("dtype") is not None:
            out["dtype"] = parse_dtype(out["dtype"])
        for name in ("weights", "transposed"):
            if out.get(name) is not None:
                if not isinstance(out[name], list | tuple) or not all(isinstance(v, str) for v in out[name]):
                    raise ConfigError(f"{name} must be a list of parameter names, got {out[name]!r}.")
                out[name] = tuple(out[name])
        if out.get("quant_type", "nf4") not in CODE_BOOKS:
            raise ConfigError(f"quant_type must be one of {', '.join(CODE_BOOKS)}, got {out['quant_type']!r}.")
        if out.get("block_size", 64) not in BLOCK_SIZES:
            raise ConfigError(f"block_size must be one of {BLOCK_SIZES}, got {out['block_size']!r}.")
        if not isinstance(out.get("double_quant", True), bool):
            raise ConfigError(f"double_quant must be True or False, got {out['double_quant']!r}.")
        return cls(**out)

    def to_json(self) -> str:
        """Sorted keys and a final newline: same quantization, same bytes."""
        values = {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
            "weights": None if self.weights is None else list(self.weights),
            "transposed": list(self.transposed),
        }
        if self.init_lora_weights is not None:
            values["init_lora_weights"] = self.init_lora_weights
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def quantize(self, weight: torch.Tensor, *, transposed: bool) -> QuantizedTensor:
        """Dense -> 4 bits as noted here, experts (a 3-D weight) one by one. Raises InvalidWeightError for NaN, infinity."""
        return quantize_4bit(
            weight,
            quant_type=self.quant_type,
            block_size=self.block_size,
            double_quant=self.double_quant,
            transposed=transposed and weight.dim() == 2,
            per_expert=weight.dim() == 3,
        )

    def round_trip(self, weight: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        """`weight` -> the values that the 4-bit model computes with, in the dtype that its weight had."""
        return self.quantize(weight.to(self.dtype or weight.dtype), transposed=transposed).dequantize()


def read_side_file(adapter: Path) -> QuantizedBase | None:
    """The side file of an adapter folder, None if it has none. Raises CheckpointError for a broken one."""
    file = adapter / SIDE_FILE
    if not file.is_file():
        return None
    try:
        return QuantizedBase.from_dict(read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file} is corrupt: {error}") from error


def common_base(found: Iterable[QuantizedBase | None]) -> QuantizedBase:
    """The one quantization that several adapters were trained on; the default where none is noted.

    Raises ConfigError where they differ: there is no one base that all of them saw.
    """
    noted = {base for base in found if base is not None}
    if len(noted) > 1:
        raise ConfigError(
            "The adapters were trained on differently quantized bases: export with base_precision='original', "
            "or say which quantization to use with quant={...}."
        )
    return noted.pop() if noted else QuantizedBase()
