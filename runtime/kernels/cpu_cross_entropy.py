"""The C++ sweep over rows of logits as a Python function: losses, and the logits' gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import KernelError
from . import cpp_build


def make_cross_entropy() -> Callable[..., None] | None:
    """Builds the library and returns `cross_entropy`; None on a machine without AVX-512 BF16. Raises KernelError."""
    types = (*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2, *[ctypes.c_float] * 2, ctypes.c_int)
    kernel = cpp_build.bind("cross_entropy", *types, needs="avx512_bf16")
    if kernel is None:
        return None

    def cross_entropy(
        z: Tensor,
        target: Tensor,
        losses: Tensor,
        out: Tensor | None = None,
        rows: Tensor | None = None,
        scale: float = 1.0,
        soft_cap: float = 0.0,
    ) -> None:
        """losses fp32 [M] = logsumexp(y[rows]) - y[rows, target] for z bf16 [.., V], target and rows int64 [M] (rows None:
        all of z), y = scale z, with a cap soft_cap tanh(scale z / soft_cap). `out` bf16 [M, V], or z itself, gets the
        gradient of their sum with respect to z, (softmax(y) - onehot(target)) y'.

        Raises KernelError for a target that is no class or a row that is not in z.
        """
        m, v = len(losses), z.shape[1]
        _check("z", z, torch.bfloat16, (m if rows is None else len(z), v))
        _check("target", target, torch.int64, (m,))
        _check("losses", losses, torch.float32, (m,))
        if out is not None:
            _check("out", out, torch.bfloat16, (m, v))
        if not _are_within(target, v):
            raise KernelError(f"A target is no class: there are {v}.")
        if rows is not None:
            _check("rows", rows, torch.int64, (m,))
            if not _are_within(rows, len(z)):
                raise KernelError(f"A row is not in z, which has {len(z)}.")
        kernel(
            *(z.data_ptr(), None if rows is None else rows.data_ptr(), target.data_ptr(), losses.data_ptr()),
            *(None if out is None else out.data_ptr(), m, v, scale, soft_cap, torch.get_num_threads()),
        )

    return cross_entropy


def _check(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or t.shape != shape or not t.is_contiguous() or not t.is_cpu:
        raise KernelError(f"{name} must be a contiguous {dtype} {[*shape]} CPU tensor, got {t.dtype} {[*t.shape]}.")


def _are_within(indices: Tensor, end: int) -> bool:
    return not len(indices) or (int(indices.min()) >= 0 and int(indices.max()) < end)
