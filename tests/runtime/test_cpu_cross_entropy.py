"""The generated sweep over rows of logits against fp64: losses, gradients in place, nothing past the ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build

available = cpp_build.find_compiler() is not None and kernels.find("cross_entropy", "cpu") is not None
pytestmark = pytest.mark.skipif(not available, reason="needs a C++ compiler and AVX-512 BF16")


@pytest.fixture
def sweep() -> Callable[..., Any]:
    found = kernels.find("cross_entropy", "cpu")
    assert found is not None
    return found


CHANGES = [(1.0, 0.0), (0.0625, 0.0), (-0.5, 0.0), (1.0, 30.0), (0.5, 3.0), (-2.0, -4.0)]


@pytest.mark.parametrize(("scale", "soft_cap"), CHANGES)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 31), (5, 32), (4, 33), (7, 211), (2, 5003), (0, 9)])
def test_against_fp64(sweep: Callable[..., Any], m: int, v: int, gradient: bool, scale: float, soft_cap: float) -> None:
    gen = torch.Generator().manual_seed(v)
    flat = torch.full((m * v + 40,), 7.0).bfloat16()
    z = flat[: m * v].view(m, v)
    z.copy_(torch.randn(m, v, generator=gen) * 5)
    given, target = z.clone(), torch.randint(0, v, (m,), generator=gen)
    losses = torch.empty(m)
    sweep(z, target, losses, z if gradient else None, None, scale, soft_cap)
    wide = given.double().requires_grad_()
    y = soft_cap * torch.tanh(scale * wide / soft_cap) if soft_cap else scale * wide
    expected = F.cross_entropy(y, target, reduction="none")
    # fp32 sums of up to 5003 terms in 16 lanes, each term by an exponential of 2 units: 2^-16 of the sum
    torch.testing.assert_close(losses.double(), expected.detach(), atol=2**-15, rtol=2**-16)
    if not gradient:
        assert torch.equal(z, given)
    elif m:
        (want,) = torch.autograd.grad(expected.sum(), wide)
        assert ((z.double() - want).abs() <= want.abs() * 2**-8 + 2**-20).all()  # one rounding to bf16, of fp32
    assert (flat[m * v :] == 7.0).all()


def test_some_rows_with_the_gradient_elsewhere(sweep: Callable[..., Any]) -> None:
    z = (torch.randn(9, 70) * 3).bfloat16()
    rows, target = torch.tensor([8, 0, 5]), torch.tensor([69, 3, 3])
    losses, out, given = torch.empty(3), torch.empty(3, 70).bfloat16(), z.clone()
    sweep(z, target, losses, out, rows)
    picked = z[rows].contiguous()
    expected = torch.empty(3)
    sweep(picked, target, expected, picked)  # in place, all rows
    assert torch.equal(out, picked) and torch.equal(losses, expected) and torch.equal(z, given)
    with pytest.raises(KernelError, match="A row is not in z, which has 9"):
        sweep(z, target, losses, out, torch.tensor([8, 9, 0]))


def test_extremes(sweep: Callable[..., Any]) -> None:
    """Logits of minus infinity have no part, large ones no overflow, and NaN spreads over its own row only."""
    z = torch.zeros(4, 40).bfloat16()
    z[0, 3:] = -torch.inf
    z[1] = -3e38
    z[1, 39] = 3e38
    z[2, 17] = torch.nan
    losses = torch.empty(4)
    sweep(z, torch.tensor([1, 39, 5, 8]), losses, z)
    assert losses[0].item() == pytest.approx(torch.tensor(3.0).log().item()) and losses[1] == 0
    assert (z[0, 3:] == 0).all() and (z[1] == 0).all() and losses[2].isnan() and z[3].isfinite().all()
    z[0, :3], z[0, 3:], z[1, 39] = 0, -torch.inf, torch.inf
    sweep(z, torch.tensor([1, 39, 5, 8]), losses, z, None, 1.0, 2.0)  # a cap: minus two and two, of no slope
    assert losses[0].item() == pytest.approx(math.log(3 + 37 * math.exp(-2))) and (z[0, 3:] == 0).all()
    assert losses[1].item() == pytest.approx(math.log(1 + 39 * math.exp(-2))) and z[1, 39] == 0


def test_bad_arguments_never_reach_c(sweep: Callable[..., Any]) -> None:
    z, losses = torch.zeros(2, 9).bfloat16(), torch.empty(2)
    with pytest.raises(KernelError, match="A target is no class: there are 9"):
        sweep(z, torch.tensor([0, 9]), losses)
    with pytest.raises(
        KernelError, match=r"z must be a contiguous torch.bfloat16 \[2, 9\] CPU tensor, got torch.float32"
    ):
        sweep(z.float(), torch.tensor([0, 1]), losses)
    with pytest.raises(KernelError, match="losses must be a contiguous"):
        sweep(z, torch.tensor([0, 1]), losses.double())
