"""The C++ sweep over rows of logits as a Python function: losses, and the logits' gradient in their place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import KernelError
from . import cpp_build


def make_cross_entropy() -> Callable[..., None] | None:
    """Builds the library and returns `cross_entropy`; None on a machine without AVX-512 BF16. Raises KernelError."""
    if "avx512" not in cpp_build.instruction_sets():
        return None
    library = cpp_build.load("cross_entropy")
    if not library.qlora_has_cross_entropy():
        return None
    kernel = library.qlora_cross_entropy
    kernel.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 2)
    kernel.restype = None

    def cross_entropy(z: Tensor, target: Tensor, losses: Tensor, gradient: bool) -> None:
        """losses fp32 [M] = logsumexp(z) - z[target] for z bf16 [M, V], target int64 [M].

        With `gradient`, z becomes softmax(z) - onehot(target). Raises KernelError for a target that is no class.
        """
        m, v = z.shape
        for name, t, dtype, shape in (
            ("z", z, torch.bfloat16, (m, v)), ("target", target, torch.int64, (m,)), ("losses", losses, torch.float32, (m,)),
        ):  # fmt: skip
            if t.dtype != dtype or t.shape != shape or not t.is_contiguous() or not t.is_cpu:
                raise KernelError(
                    f"{name} must be a contiguous {dtype} {[*shape]} CPU tensor, got {t.dtype} {[*t.shape]}."
                )
        if m > 0 and not (int(target.min()) >= 0 and int(target.max()) < v):
            raise KernelError(f"A target is no class: there are {v}.")
        kernel(z.data_ptr(), target.data_ptr(), losses.data_ptr(), m, v, gradient, torch.get_num_threads())

    return cross_entropy
