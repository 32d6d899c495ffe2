"""Classes that an edit of a model makes out of a module's own class, and how pickle stores their instances.

pickle finds a class by its name in a module, where these do not stand. An instance is stored as the class that the module
had before, and the edits that lead from it to the present one.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import ModelStateError

_EDIT = "_qlora_edit"


def edited_class(
    name: str, bases: tuple[Any, ...], body: dict[str, Any], factory: Callable[..., type], cls: Any, *arguments: Any
) -> type[nn.Module]:
    """`type(name, bases, body)`; `factory(cls, *arguments)` gives this very class again, in any process (a function that
    stands in a module, cached)."""
    return type(name, bases, body | {_EDIT: (cls, factory, arguments), "__reduce_ex__": _reduce})


def _reduce(self: Any, protocol: Any) -> Any:
    cls: Any = type(self)
    if _EDIT not in cls.__dict__:  # somebody's subclass of an edited class (FSDP2's)
        return object.__reduce_ex__(self, protocol)
    edits: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    while _EDIT in cls.__dict__:
        cls, factory, arguments = cls.__dict__[_EDIT]
        edits.append((factory, arguments))
    made, arguments, *rest = cls.__reduce_ex__(self, 2)
    if made is not copyreg.__newobj__ or len(arguments) != 1:  # type: ignore[attr-defined]
        raise ModelStateError(
            f"{cls.__name__} says by itself how it is pickled or copied, which would lose its adapters: save state_dict(), "
            "or the adapters with save_adapter."
        )
    return _blank, (cls, edits[::-1]), *rest


def _blank(cls: Any, edits: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Any:
    """An instance, without its state, of the class that the edits make of `cls`."""
    for factory, arguments in edits:
        cls = factory(cls, *arguments)
    return cls.__new__(cls)
