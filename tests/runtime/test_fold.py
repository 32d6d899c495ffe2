"""The sum itself: half a unit in the last place against exact arithmetic, both orientations, blocks of rows."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from qlora_compile.runtime import fold as fold_module
from qlora_compile.runtime.fold import LoraTerm, fold, measure

SHAPE = (37, 23)


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `dtype` at each fp64 value (none of them is a denormal of `dtype`)."""
    _, exponent = torch.frexp(values)  # the mantissa is in [0.5, 1)
    return torch.finfo(dtype).eps / 4 * torch.exp2(exponent.double())


def terms(*ranks: int, scale: float = 0.5) -> list[LoraTerm]:
    torch.manual_seed(1)
    return [LoraTerm(torch.randn(r, SHAPE[1]), torch.randn(SHAPE[0], r), scale * (-1) ** r) for r in ranks]


def exact(weight: torch.Tensor, parts: list[LoraTerm]) -> torch.Tensor:
    out = weight.double()
    for part in parts:
        out = out + part.scale * (part.b.double() @ part.a.double())
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", [(3,), (5, 2, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_is_half_a_unit_in_the_last_place(dtype: torch.dtype, ranks: tuple[int, ...], transposed: bool) -> None:
    weight = torch.randn(SHAPE).to(dtype)
    parts = terms(*ranks)
    wanted = exact(weight, parts)
    got = fold(weight.t() if transposed else weight, parts, transposed=transposed)
    assert got.dtype == dtype
    got = got.t() if transposed else got
    # 2^-12: torch rounds fp64 to 16 bits by way of fp32, which adds 2^-16 to 2^-13 of a unit.
    assert bool(((got.double() - wanted).abs() <= half_ulp(wanted, dtype) * (1 + 2**-12)).all())


def test_fp32_result_is_the_correctly_rounded_rational_sum() -> None:
    weight, parts = torch.randn(SHAPE), terms(2, 1)
    got = fold(weight, parts)
    for i, j in ((0, 0), (36, 22), (17, 5)):
        total = Fraction(weight[i, j].item())
        for part in parts:
            products = (Fraction(part.b[i, k].item()) * Fraction(part.a[k, j].item()) for k in range(part.a.shape[0]))
            total += Fraction(part.scale) * sum(products)
        assert got[i, j] == torch.tensor(float(total), dtype=torch.float64).float()


def test_not_changed_by_reduced_precision_matmuls() -> None:
    weight, parts = torch.randn(SHAPE), terms(3)
    before = torch.get_float32_matmul_precision()
    wanted = fold(weight, parts)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fold(weight, parts), wanted)
    finally:
        torch.set_float32_matmul_precision(before)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, parts = torch.randn(SHAPE), terms(3, 2)
    wanted, error = fold(weight, parts), measure("w", weight, weight, parts)
    monkeypatch.setattr(fold_module, "BLOCK_BYTES", 5 * SHAPE[1] * 8)
    assert len(list(fold_module.exact_blocks(weight, parts))) == 8
    assert torch.equal(fold(weight, parts), wanted)
    assert measure("w", weight, weight, parts).relative == pytest.approx(error.relative, rel=1e-12)


def test_one_rounding_beats_one_rounding_per_adapter() -> None:
    weight, parts = torch.randn(SHAPE).bfloat16(), terms(4, 3, 2, 5, scale=0.05)
    wanted = exact(weight, parts)
    once = fold(weight, parts)
    again = weight
    for part in parts:
        again = fold(again, [part])
    assert (once.double() - wanted).norm() < 0.8 * (again.double() - wanted).norm()


def test_inputs_stay_as_they_are() -> None:
    weight, parts = torch.randn(SHAPE, dtype=torch.float64), terms(2)
    copies = weight.clone(), parts[0].a.clone(), parts[0].b.clone()
    assert not torch.equal(fold(weight, parts), weight)
    assert all(torch.equal(x, y) for x, y in zip(copies, (weight, parts[0].a, parts[0].b), strict=True))


def test_measured_error() -> None:
    weight = torch.zeros(2, 3)
    weight[0, 0], weight[1, 2] = 3.0, 4.0
    written = weight.clone()
    written[0, 1] = 0.6
    error = measure("layer", written, weight, [])
    assert (error.max_abs, error.relative) == pytest.approx((0.6, 0.12), rel=1e-6)
    assert error.mean_abs == pytest.approx(0.1, rel=1e-6)
    assert error.cosine == pytest.approx(5 / (25 + 0.36) ** 0.5, rel=1e-6)
    assert measure("zero", torch.zeros(2, 3), torch.zeros(2, 3), []).cosine == 1.0
