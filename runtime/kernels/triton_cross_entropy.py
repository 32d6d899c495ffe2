"""The Triton sweep over rows of logits as a Python function: losses and the logits' gradient, one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import KernelError
from . import triton_build
from .triton_common import DTYPES, FUSED, next_power_of_2
from .triton_launch import TENSOR, Launch, prepared

MOST_BLOCK = 2048  # logits at a time: 8 a thread, one access of 16 bytes


def cross_entropy(
    z: Tensor,
    target: Tensor,
    losses: Tensor,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float = 0.0,
) -> None:
    """losses fp32 [M] = logsumexp(y[rows]) - y[rows, target] for z [.., V], target int64 [M], rows int64 [M] (None: all),
    y = scale z, with a cap soft_cap tanh(scale z / soft_cap).

    `out` [M, V], or z itself: gets the gradient of the losses' sum with respect to z, (softmax(y) - onehot(target)) y'. The
    loss of a target that is no class is NaN: nobody waits for the device to raise for it.
    """
    tensors = [z, *([] if rows is None else [rows]), target, losses, *([] if out is None else [out])]
    launch = prepared(
        ("cross_entropy", rows is None, out is None, scale, soft_cap),
        tensors,
        lambda: _launch(z, target, losses, out, rows, scale, soft_cap),
    )
    if losses.numel():
        launch(tensors)


def _launch(
    z: Tensor,
    target: Tensor,
    losses: Tensor,
    out: Tensor | None,
    rows: Tensor | None,
    scale: float,
    soft_cap: float,
) -> Launch:
    m = len(losses)
    v = z.shape[1]
    for name, t, dtypes, shape in (
        ("z", z, DTYPES, (m if rows is None else len(z), v)),
        ("target", target, (torch.int64,), (m,)),
        ("losses", losses, (torch.float32,), (m,)),
        ("out", z if out is None else out, DTYPES, (m, v) if out is not None else z.shape),
        ("rows", target if rows is None else rows, (torch.int64,), (m,)),
    ):
        if t.dtype not in dtypes or t.shape != shape or t.device != z.device or t.stride(-1) != 1:
            raise KernelError(
                f"{name} must be a {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {[*shape]} tensor on "
                f"{z.device} with contiguous rows, got {t.dtype} {[*t.shape]} on {t.device}."
            )
    capped = soft_cap != 0
    scaled = capped or scale != 1
    spec = {
        "rows": rows is not None,
        "gradient": out is not None,
        "scaled": scaled,
        "capped": capped,
        "ragged": any(t.stride(0) * t.element_size() % 16 for t in (z, z if out is None else out)),
        "uses_codes": False,
    }
    arguments = [TENSOR, z.stride(0), *[TENSOR] * (2 if rows is None else 3)]
    arguments += [*([] if out is None else [TENSOR, out.stride(0)]), v]
    arguments += [float(scale)] * scaled + [float(soft_cap)] * capped
    kernel = triton_build.load("cross_entropy", **spec).cross_entropy
    return Launch(kernel, (m,), arguments, BLOCK=min(next_power_of_2(v), MOST_BLOCK), num_warps=8, **FUSED)
