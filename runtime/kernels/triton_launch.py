"""Launches that are prepared once: a kernel with its grid, sizes and options, for every call with tensors of one form.

At each launch Triton finds out anew which specialization of a kernel its arguments ask for, and our own functions check
shapes and reckon tiles before that: together some 20 us of Python, of which a training step has dozens in each layer.
Here both happen at the first call. The next one with tensors of the same form looks the launch up and hands Triton's
compiled kernel their addresses (`CompiledKernel.__getitem__`, which Triton's tutorials launch with).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .triton_common import on_device

TENSOR = object()  # stands among a launch's arguments where a call's next tensor goes
MOST_LAUNCHES = 8192  # a run with ever new lengths begins again then


class Launch:
    """`kernel[grid](*arguments, **options)` with a call's tensors in the places of TENSOR, on their device.

    `options`: what the kernel takes as `tl.constexpr`, in its order, and num_warps, enable_fp_fusion. `splits`: for the
    caller, over how many programs a sum is divided.
    """

    __slots__ = ("_arguments", "_compiled", "_constants", "_grid", "_kernel", "_options", "_slots", "splits")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], splits: int = 1, **options: Any
    ) -> None:
        self._kernel, self._options, self.splits = kernel, options, splits
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = list(arguments)
        self._slots = [i for i, argument in enumerate(arguments) if argument is TENSOR]
        self._constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        self._compiled: dict[tuple[bool, ...], Callable[..., None]] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        special = tuple([address & 15 == 0 for address in addresses])  # all that Triton reads of an address
        if torch.version.hip is not None:  # and there also whether offsets from it take 32 bits
            special += tuple([tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors])
        run = self._compiled.get(special)
        arguments = self._arguments.copy()
        given: Sequence[Any] = tensors if run is None else addresses
        for slot, value in zip(self._slots, given, strict=True):
            arguments[slot] = value
        with on_device(tensors[0]):
            if run is not None:
                run(*arguments, *self._constants)
                return
            compiled = self._kernel[self._grid](*arguments, **self._options)
            if compiled is not None:  # the interpreter compiles nothing
                self._compiled[special] = compiled[self._grid]


_launches: dict[tuple[Any, ...], Launch] = {}


def prepared(what: tuple[Any, ...], tensors: Sequence[Tensor], make: Callable[[], Launch]) -> Launch:
    """The launch for `what` (an op and every number that it depends on) and tensors of this form: shapes, strides, dtypes
    and devices. `make` checks them and raises KernelError; it is asked once."""
    key = what, *[(t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= MOST_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = make()
    return launch
