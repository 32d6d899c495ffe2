"""The loss of a transformers model whose class names none: the one that transformers falls back to, without its warning.

`model.loss_function` of such a model (GPT-2, BERT as a decoder, XLNet) warns on every call, and Dynamo breaks the graph at
a warning: the logits would leave the graph, and the loss would run outside of it.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

FALLBACK = (
    "ForCausalLM"  # PreTrainedModel.loss_function's own; `tests/qlora_compile/test_transformers_loss.py` compares
)


def name_losses(model: nn.Module) -> bool:
    """Name the loss of every model in `model` that takes labels and names none. -> whether there was one."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return False
    nameless = [module for module in model.modules() if _is_nameless(module, transformers)]
    for module in nameless:
        module.loss_type = FALLBACK  # type: ignore[assignment]
    return bool(nameless)


def _is_nameless(module: Any, transformers: Any) -> bool:
    known = getattr(transformers, "LOSS_MAPPING", {})
    return (
        isinstance(module, transformers.PreTrainedModel)
        and FALLBACK in known
        and not hasattr(module, "_loss_function")
        and getattr(module, "loss_type", None) not in known
        and "labels" in inspect.signature(module.forward).parameters
    )
