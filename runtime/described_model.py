"""config.json -> all that it means to transformers: the options that it leaves out, and the model that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, MissingDependencyError
from ..param_info import is_conv1d


def described_model(config: Mapping[str, Any]) -> nn.Module | None:
    """No weight is read or made. None where transformers is missing, does not know the architecture or cannot build it."""
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        return None
    cls = _architecture(transformers, config)
    if cls is None:
        return None
    try:
        with torch.device("meta"):
            return cls(cls.config_class.from_dict(dict(config)))
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, StrictDataclassError):
        return None


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what it leaves out, as transformers fills it in for the architecture named there.

    Raises MissingDependencyError, CheckpointError (no such architecture, or options that its configuration refuses).
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError:
        raise MissingDependencyError("transformers", "transformers", "Reading a config.json whole") from None
    cls = _architecture(transformers, config)
    if cls is None:
        raise CheckpointError(f"config.json names {config.get('architectures')}, unknown to transformers.")
    try:
        filled = cls.config_class.from_dict(dict(config)).to_dict()
    except (ValueError, TypeError, LookupError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json is no configuration of {cls.__name__}: {str(error).splitlines()[0]}"
        ) from error
    return {**filled, **{name: value for name, value in config.items() if value is not None}}


def _architecture(transformers: Any, config: Mapping[str, Any]) -> Any:
    """The class that config.json names; None where this transformers has none of that name."""
    return getattr(transformers, str((config.get("architectures") or ["?"])[0]), None)


class LinearLayout:
    """Which linears hold their weight as [in, out], asked of `model` if given, else of the one that `config` describes.

    The model is built when it is first needed: shapes tell, except of square weights.
    """

    def __init__(self, config: Mapping[str, Any], model: nn.Module | None = None) -> None:
        self._config, self._model = config, model
        self._found: dict[str, bool] | None = None

    def modules(self) -> Mapping[str, bool]:
        """Path of each linear -> whether it is a Conv1D. Empty where the model is not known."""
        if self._found is None:
            model = self._model or described_model(self._config)
            linears = model.named_modules() if model is not None else ()
            self._found = {n: is_conv1d(m) for n, m in linears if isinstance(m, nn.Linear) or is_conv1d(m)}
        return self._found
