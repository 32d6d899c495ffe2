"""What requantizing lost, as an adapter: LoRA of the largest directions of `exact sum - 4-bit values` (LoftQ's step)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..initialization import top_singular
from ..tensor import QuantizedTensor
from .fold import LayerError, LoraTerm, measure
from .formats.peft_files import PREFIX, write_adapter

FOLDER = "correction"
# Of the subspace iteration: enough that the error is within a percent of a whole decomposition's, at a fraction of its time.
ROUNDS = 4


@dataclass
class Correction:
    """Makes and collects a rank-`rank` correction per 4-bit weight, and how far each is off with it."""

    rank: int
    layers: list[LayerError] = field(default_factory=list)
    _tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(
        self, name: str, quantized: QuantizedTensor, weight: torch.Tensor, terms: list[LoraTerm], exact: torch.Tensor
    ) -> tuple[LayerError, dict[str, torch.Tensor]]:
        """One weight's correction: its error with it, and its factors by their names in the file.

        `exact`: what was quantized, fp32; `weight` and `terms`: the sum that it is of; `name`: the parameter's.
        """
        rest = exact.float() - quantized.dequantize().float()
        rest = rest.t() if quantized.transposed else rest
        rank = min(self.rank, *rest.shape)
        a, b = top_singular(rest, rank, 1.0, ROUNDS)
        module = name.removesuffix(".weight")
        factors = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        delta = (b @ a).t() if quantized.transposed else b @ a
        corrected = quantized.dequantize().float() + delta
        return measure(name, corrected, weight, terms, transposed=quantized.transposed), factors

    def take(self, error: LayerError, factors: Mapping[str, torch.Tensor]) -> None:
        self.layers.append(error)
        self._tensors |= factors

    def write(self, folder: Path) -> None:
        """`folder`/correction: an adapter that stock peft puts onto the 4-bit model."""
        modules = sorted(
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in self._tensors if "lora_A" in key
        )
        ranks = {module: self._tensors[f"{PREFIX}{module}.lora_A.weight"].shape[0] for module in modules}
        smaller = {f"^{m.replace('.', '[.]')}": rank for m, rank in ranks.items() if rank != self.rank}
        config = {
            "alpha_pattern": smaller,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": self.rank,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": smaller,
            "target_modules": modules,
        }
        write_adapter(folder / FOLDER, config, self._tensors)
