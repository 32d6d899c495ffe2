"""The error classes: one per kind of mistake, each with one clear sentence that names the thing and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QLoRACompileError(Exception):
    """Base of every error that this package raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(QLoRACompileError, ValueError):
    """An option has a value that it cannot have."""

    exit_code = 2


class UnknownOptionError(ConfigError):
    """An option does not exist; the message names the nearest one that does."""

    def __init__(self, name: str, known: Iterable[str], what: str = "option") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
        super().__init__(f"Unknown {what} {name!r}: {hint}")


class NoTargetError(QLoRACompileError):
    """The targets in the configuration match no linear layer of the model."""

    exit_code = 2


class InvalidWeightError(QLoRACompileError):
    """A weight cannot be quantized (NaN, infinity, a dtype that is not floating point)."""


class ModelStateError(QLoRACompileError):
    """The model is not in a state that allows this (several devices, prepared with another configuration, ...)."""

    exit_code = 2


class NoAdapterError(ModelStateError):
    """There is no adapter to train, save or set: the model was not prepared, or has none of that name."""


class CheckpointError(QLoRACompileError):
    """A checkpoint, adapter or export folder is missing, corrupt, truncated or of another model."""


class InputPathError(CheckpointError):
    """A path that was given leads to nothing, or to something of another kind."""

    exit_code = 2


class AdapterMismatchError(CheckpointError):
    """An adapter's tensors do not fit the base model."""


class DataError(QLoRACompileError):
    """A training data file cannot be read or holds nothing usable; the message names file and line."""

    exit_code = 2


class OutputError(QLoRACompileError):
    """An output folder or file cannot be written, or already holds something."""

    exit_code = 2


class RunStoreError(QLoRACompileError):
    """The store of training runs is corrupt, of a newer version, or cannot be read or written."""


class MemoryBudgetError(QLoRACompileError):
    """A memory budget cannot be met: it is too small or no size at all, or host memory or disk for pages ran out."""

    exit_code = 2


class NonFiniteError(QLoRACompileError):
    """Loss or gradients stayed NaN or infinite for too many steps in a row."""


class DistributedError(QLoRACompileError):
    """The processes of a run did not find each other, or one of them ended before the others."""


class PassError(QLoRACompileError):
    """A compiler pass failed; the message names the pass and the node."""


class KernelError(QLoRACompileError):
    """A generated kernel could not be built or was called with something that it does not support."""


class SecondDerivativeError(QLoRACompileError, RuntimeError):
    """A gradient that a fused op gave was differentiated once more."""

    def __init__(self, op: str) -> None:
        super().__init__(
            f"{op} has a first derivative only: for a second one (create_graph=True) call the model without torch.compile, "
            "where linears have it."
        )


class MissingDependencyError(QLoRACompileError):
    """An optional package is needed for this; the message says which extra installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: pip install 'qlora-compile[{extra}]' "
            f"(from a clone: pip install -e '.[{extra}]')."
        )
