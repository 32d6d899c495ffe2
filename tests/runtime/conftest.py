"""Shared by the tests of adapters and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.runtime.formats.peft_files import PREFIX, write_adapter


@pytest.fixture
def make_adapter() -> Callable[..., Path]:
    """A writer of PEFT folders: LoRA with r=3 and alpha=5 on q_proj and down_proj (or `targets`), B not zero.

    `(path, model, seed=, r=, extra=further tensors, targets=, **further keys of the config)` -> path.
    """
    return _make_adapter


def _make_adapter(
    path: Path, model: torch.nn.Module, *, seed: int = 0, r: int = 3, extra: dict[str, Any] | None = None, **config: Any
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = dict(extra or {})
    targets = config.pop("targets", ("q_proj", "down_proj"))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] not in targets or not isinstance(weight, torch.Tensor):
            continue
        shape = tuple(weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape)
        if isinstance(module, torch.nn.Embedding):
            shape = shape[::-1]
            keys = ("lora_embedding_A", "lora_embedding_B")
        else:
            keys = ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{name}.{keys[0]}"] = torch.randn(r, shape[1], generator=generator) * 0.3
        tensors[f"{PREFIX}{name}.{keys[1]}"] = torch.randn(shape[0], r, generator=generator) * 0.3
    base = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "target_modules": list(targets)}
    return write_adapter(path, base | config, tensors)
