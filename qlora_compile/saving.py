"""`save_pretrained` of a transformers model with adapters: it writes them, as PEFT's models do, and no 4-bit base.

So transformers' `Trainer` writes checkpoints of a prepared model, and resumes from them, with no code of ours in between.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .class_edits import edited_class
from .errors import ConfigError


def save_adapters_of(root: nn.Module) -> None:
    """Have the `save_pretrained` of a transformers model write its adapters, as long as it has any; idempotent.

    Not while Dynamo traces the model: its guards name the model's class and the bases of it.
    """
    cls: Any = type(root)
    if hasattr(cls, "save_pretrained") and not cls.__module__.startswith("peft.") and not hasattr(cls, "_qlora_saves"):
        root.__class__ = saving_class(cls)


@functools.cache
def saving_class(cls: Any) -> type[nn.Module]:
    """The class of a model whose adapters, and not its 4-bit base, are what `save_pretrained` writes."""

    @functools.wraps(cls.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        from .runtime.model_folder import has_adapters

        if has_adapters(self):
            _save(self, save_directory, *args, **kwargs)
        else:
            cls.save_pretrained(self, save_directory, *args, **kwargs)

    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        from .runtime.model_folder import trained_names

        result = cls.load_state_dict(self, state_dict, strict, assign)
        if result.missing_keys and set(state_dict) == trained_names(self):
            result.missing_keys.clear()  # what `save_pretrained` wrote: the base is no part of it, and not missing
        return result

    body = {"save_pretrained": save_pretrained, "load_state_dict": load_state_dict, "_qlora_saves": True}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return edited_class(cls.__name__, (cls,), body | names, saving_class, cls)


def _save(
    model: nn.Module,
    folder: Any,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    *args: Any,
    **options: Any,
) -> None:
    """transformers' arguments; those after `push_to_hub` say how a whole model is written, which this is not."""
    from .runtime.model_folder import save_model_folder

    if push_to_hub:
        raise ConfigError("save_pretrained writes a prepared model's adapters and uploads nothing: call push_to_hub().")
    save_model_folder(model, folder, write=is_main_process)
