"""Dense products in fp32 with one rounding, against fp64; the ops' contracts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_compile import wide_ops
from qlora_compile.runtime.kernels import cpu_gemm

OPS = torch.ops.qlora
HALVES = [torch.bfloat16, torch.float16]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """`roundings` of half a unit relative to the value, and fp32 sums of some hundred terms beside the largest value."""
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    tolerance = expected.abs() * unit * roundings + expected.abs().max() * (2**-16 + unit * (roundings - 1))
    assert ((got.double() - expected).abs() <= tolerance).all(), float((got.double() - expected).abs().max())


def both(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in inputs]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("step", [4096, 100, 0])
def test_linear(dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library, also with fewer rows of the weight at a time than it has; and (0) by the generated product."""
    if step == 0 and cpu_gemm.declines():
        pytest.skip("wide_gemm cannot run here")
    monkeypatch.setattr(wide_ops, "kernel_for", lambda op, device: cpu_gemm.wide_gemm)  # where AVX-512 is, too
    monkeypatch.setattr(wide_ops, "WEIGHT_ROWS", step)
    torch.manual_seed(step)
    x, w, b = torch.randn(3, 5, 65), torch.randn(257, 65), torch.randn(257)
    inputs = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    y = OPS.wide_linear(*inputs, wide_ops.LIBRARY if step else wide_ops.FUSED)
    wide = both(inputs)
    expected = F.linear(*wide)
    close(y, expected.detach(), dtype)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, wide, dy.double())):
        # the bias's gradient is torch's own sum of bf16 numbers
        close(got, want, dtype, roundings=1 if want.dim() > 1 else 2)


def test_linear_saves_nothing_that_a_frozen_weight_does_not_need() -> None:
    x, w = torch.randn(5, 65).bfloat16().requires_grad_(), torch.randn(33, 65).bfloat16()
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        OPS.wide_linear(x, w, None, wide_ops.LIBRARY)
    assert [t.data_ptr() for t in saved] == [w.data_ptr()]


SHAPES = [
    ((7, 33), (33, 9)),
    ((2, 3, 7, 33), (2, 3, 33, 9)),
    ((3, 7, 33), (33, 9)),
    ((7, 33), (4, 33, 9)),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_matmul_broadcasts(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    y, wide = OPS.wide_matmul(*inputs), both(inputs)
    expected = wide[0] @ wide[1]
    close(y, expected.detach(), torch.bfloat16)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, wide, dy.double())):
        close(got, want, torch.bfloat16, roundings=2)  # a broadcast operand's gradients are summed in bf16


def test_opcheck() -> None:
    x, w, b = torch.randn(3, 5, 65).bfloat16(), torch.randn(33, 65).bfloat16(), torch.randn(33).bfloat16()
    torch.library.opcheck(OPS.wide_linear.default, (x.clone().requires_grad_(), w, b, wide_ops.LIBRARY))
    torch.library.opcheck(OPS.wide_linear.default, (*(t.clone().requires_grad_() for t in (x, w, b)), wide_ops.LIBRARY))
    torch.library.opcheck(
        OPS.wide_linear_backward.default, (torch.randn(3, 5, 33).bfloat16(), x, w, True, wide_ops.LIBRARY)
    )
    torch.library.opcheck(OPS.wide_matmul.default, (x.clone().requires_grad_(), w.t().clone().requires_grad_()))
