"""Shared by the tests of adapters, exports and training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.config import QLoRAConfig
from qlora_compile.runtime.finetune import FinetuneConfig
from qlora_compile.runtime.formats.peft_files import PREFIX, write_adapter

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
WORDS += ["while", "seven", "wizards", "mix", "a", "jug", "of", "bad", "liquor"]


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


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents of 60 and 45 words, in an order that repeats only after 11 words."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("a.txt", 60), ("b.txt", 45)):
        (folder / name).write_text(" ".join(WORDS[(i * 5 + i // 11) % len(WORDS)] for i in range(count)))
    return folder


@pytest.fixture
def make_config(tiny_checkpoint: Path, texts: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """A maker of small uncompiled runs: `(out name, qlora=..., **FinetuneConfig fields)` -> FinetuneConfig."""

    def make(out: str = "out", **changes: Any) -> FinetuneConfig:
        qlora = {"r": 3, "compute_dtype": "float32", "lora_dropout": 0.1} | changes.pop("qlora", {})
        options: dict[str, Any] = {
            "model": tiny_checkpoint,
            "data": texts,
            "out": tmp_path / out,
            "qlora": QLoRAConfig(**qlora),
            "steps": 8,
            "batch": 2,
            "grad_accum": 2,
            "seq_len": 11,
            "lr": 1e-2,
            "save_every": 3,
            "compile": False,
        }
        return FinetuneConfig(**(options | changes))

    return make
