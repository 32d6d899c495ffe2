"""Names that transformers gives while it loads: `vit.layers.0.attention.q_proj.weight` is, in the checkpoint,
`vit.encoder.layer.0.attention.attention.query.weight`.

Adapters carry the model's names, and a folded checkpoint keeps its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .described_model import described_model


def renamed_keys(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Parameter's name in the model -> key of the checkpoint, for tensors that are renamed and nothing else.

    `config` is config.json. Empty where transformers is missing, too old to rename, or does not know the architecture.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return {}
    model: Any = described_model(config)
    if model is None:
        return {}
    changes = get_model_conversion_mapping(model)
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    wanted, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, prefix, wanted)
        if converter is None and name != key and name in wanted:
            found[name] = key
    return found
