"""How long a sequence a model takes."""

from __future__ import annotations

from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "max_seq_len")  # in configurations: the most that it was made for


def most_positions(model: nn.Module) -> int | None:
    """Tokens of a sequence that `model` was made for, as its configuration says; None where it sets no limit.

    RoBERTa's family counts positions from behind the padding's, so that those up to it are no token's.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model that reads images, too
        config = config.get_text_config()
    most = next((n for name in _NAMES if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    if most is None:
        return None
    tables = (m for name, m in model.named_modules() if name.rpartition(".")[2] == "position_embeddings")
    first = next((m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None), 0)
    return most - first
