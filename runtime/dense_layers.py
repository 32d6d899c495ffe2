"""A run's budget of bits a weight -> which layers stay dense."""

from __future__ import annotations

from torch import nn

from ..config import QLoRAConfig
from .finetune_config import FinetuneConfig
from .reporters import Reporter


def with_dense_layers(model: nn.Module, config: FinetuneConfig, reporter: Reporter) -> QLoRAConfig:
    """The compiler's configuration with the layers that `dense_bits` keeps dense. The same weights give the same layers.

    Raises ConfigError for a budget that even the 4-bit format alone exceeds.
    """
    if config.dense_bits is None:
        return config.qlora
    from .. import numerics

    chosen = numerics.with_dense_layers(model, config.qlora, config.dense_bits)
    names = ", ".join(chosen.dense_modules) or "none"
    reporter.notice(
        f"{len(chosen.dense_modules)} layers stay dense within {config.dense_bits:g} bits a weight: {names}"
    )
    return chosen
