"""What stock peft makes of a small model: adapters with nothing left at zero, and their logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")

IDS = torch.arange(26).reshape(2, 13) * 7 % 101


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stock(model: Any, out: Path, seed: int = 0, **options: Any) -> torch.Tensor:
    """Save an adapter that peft made; returns its logits."""
    settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**(settings | options))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(out)
    return logits(theirs)


def in_peft(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """The logits of a folder that peft finds all keys in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return logits(peft.PeftModel.from_pretrained(model, folder).eval())
