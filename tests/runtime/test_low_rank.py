"""The generated C++ products of LoRA against fp64 sums, and the ops that call them against their torch reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import lora_group, nf4
from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build

available = cpp_build.find_compiler() is not None and kernels.find("lora_down", "cpu") is not None
pytestmark = pytest.mark.skipif(not available, reason="needs a C++ compiler and AVX-512 BF16")

sizes = st.one_of(st.integers(1, 70), st.integers(1, 300))
case = {
    "m": st.one_of(st.integers(0, 40), st.integers(0, 300)),
    "n": sizes,
    "k": sizes,
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "scale": st.sampled_from([0.0, -1.5, 0.3, 4.0]),
    "seed": st.integers(0, 999),
}
GUARD = 7.0  # around every output, to see a write outside


def kernel(name: str) -> Callable[..., Any]:
    found = kernels.find(name, "cpu")
    assert found is not None
    return found


def column_slice(m: int, columns: int, gen: torch.Generator) -> Tensor:
    """bf16 [m, columns], a slice of wider rows at an odd offset."""
    wide = torch.randn(m, columns + 6, generator=gen).bfloat16()
    return wide[:, 3 : 3 + columns]


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(an output of this shape, the elements after it)"""
    numel = torch.Size(shape).numel()
    flat = torch.full((numel + 40,), GUARD, dtype=dtype)
    return flat[:numel].view(shape), flat[numel:]


def check(out: Tensor, left: Tensor, right: Tensor, scale: float, old: Tensor | None = None) -> None:
    """out == old + scale left @ right, from bf16 factors.

    fp32 sums of up to 300 terms: 300 * 2^-24 < 2^-15 of the sum of magnitudes. A bf16 result is rounded once, by at
    most 2^-8 of itself; an fp32 one not at all.
    """
    expected = scale * (left.double() @ right.double())
    magnitudes = abs(scale) * (left.double().abs() @ right.double().abs())
    if old is not None:
        expected, magnitudes = expected + old.double(), magnitudes + old.double().abs()
    tolerance = magnitudes * 2**-15 + (expected.abs() * 2**-8 if out.dtype == torch.bfloat16 else 0) + 1e-30
    assert ((out.double() - expected).abs() <= tolerance).all()


@settings(max_examples=60, deadline=None)
@given(ranks=st.lists(st.integers(1, 70), min_size=1, max_size=3), **case)
def test_down(m: int, n: int, k: int, ranks: list[int], dtype: torch.dtype, scale: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = column_slice(m, k, gen)
    lora_a = [torch.randn(r, k, generator=gen).to(dtype) for r in ranks]
    out, after = guarded(m, sum(ranks), dtype=torch.bfloat16)
    kernel("lora_down")(x, lora_a, out)
    check(out, x, torch.cat(lora_a).bfloat16().t(), 1.0)
    assert (after == GUARD).all()


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 70), add=st.booleans(), **case)
def test_up(m: int, n: int, k: int, rank: int, add: bool, dtype: torch.dtype, scale: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    h, lora_b = column_slice(m, rank, gen), torch.randn(n, rank, generator=gen).to(dtype)
    y, after = guarded(m, n, dtype=torch.bfloat16)
    old = torch.randn(m, n, generator=gen).bfloat16()
    y.copy_(old)
    kernel("lora_up")(h, lora_b, scale, y, add)
    check(y, h, lora_b.bfloat16().t(), scale, old if add else torch.zeros_like(old))
    assert (after == GUARD).all()


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 70), wants=st.sampled_from(["both", "da", "db", "none"]), **case)
def test_backward(m: int, n: int, k: int, rank: int, wants: str, dtype: torch.dtype, scale: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    dy, x, h = column_slice(m, n, gen), column_slice(m, k, gen), column_slice(m, rank, gen)
    lora_b = torch.randn(n, rank, generator=gen).to(dtype)
    wide = torch.full((m, rank + 5), GUARD, dtype=torch.bfloat16)
    g = wide[:, 2 : 2 + rank]
    (da, after_a), (db, after_b) = guarded(rank, k, dtype=dtype), guarded(n, rank, dtype=dtype)
    grads = (da if wants in ("both", "da") else None, db if wants in ("both", "db") else None)
    kernel("lora_backward")(dy, x, h, lora_b, scale, g, *grads)
    check(g, dy, lora_b.bfloat16(), scale)
    assert (wide[:, :2] == GUARD).all() and (wide[:, 2 + rank :] == GUARD).all()
    for grad, left, right, factor in ((grads[0], g.t(), x, 1.0), (grads[1], dy.t(), h, scale)):
        if grad is not None:
            check(grad, left, right, factor)
    assert (da == GUARD).all() or grads[0] is not None
    assert (after_a == GUARD).all() and (after_b == GUARD).all()


def test_each_rank_meets_its_own_column() -> None:
    """Unit rows pick single entries, so every position of the packing is checked exactly."""
    k, n, ranks = 45, 37, [3, 17]
    lora_a = [torch.randn(r, k) for r in ranks]
    out = torch.empty(k, 20, dtype=torch.bfloat16)
    kernel("lora_down")(torch.eye(k).bfloat16(), lora_a, out)
    assert torch.equal(out, torch.cat(lora_a).bfloat16().t())
    lora_b = torch.randn(n, 20)
    y = torch.zeros(20, n, dtype=torch.bfloat16)
    kernel("lora_up")(torch.eye(20).bfloat16(), lora_b, 1.0, y)
    assert torch.equal(y, lora_b.bfloat16().t())
    x, h, g = torch.randn(n, k).bfloat16(), torch.randn(n, 20).bfloat16(), torch.empty(n, 20, dtype=torch.bfloat16)
    da, db = torch.empty(20, k), torch.empty(n, 20)
    kernel("lora_backward")(torch.eye(n).bfloat16(), x, h, lora_b, 1.0, g, da, db)
    assert torch.equal(g, lora_b.bfloat16()) and torch.equal(db, h.float())


def test_nan_and_infinity_stay_where_they_are() -> None:
    x = torch.randn(11, 33).bfloat16()
    x[4, 32], x[7, 0] = float("nan"), float("inf")
    out = torch.empty(11, 5, dtype=torch.bfloat16)
    kernel("lora_down")(x, [torch.rand(5, 33) + 0.1], out)
    finite = out.isfinite().all(dim=1)
    assert out[4].isnan().all() and (out[7] == float("inf")).all() and int(finite.sum()) == 9


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_thread_count_changes_nothing(with_threads: Callable[[int], None]) -> None:
    m, n, k, rank = 301, 197, 333, 19
    x, dy, h = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16(), torch.randn(m, rank).bfloat16()
    lora_a, lora_b, old = torch.randn(rank, k), torch.randn(n, rank), torch.randn(m, n).bfloat16()
    results = []
    for count in (1, 2, 3):
        with_threads(count)
        out, y, g = torch.empty_like(h), old.clone(), torch.empty_like(h)
        da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
        kernel("lora_down")(x, [lora_a], out)
        kernel("lora_up")(h, lora_b, 0.7, y)
        kernel("lora_backward")(dy, x, h, lora_b, 0.7, g, da, db)
        results.append((out, y, g, da, db))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_arguments_never_reach_c() -> None:
    x, out = torch.randn(3, 9).bfloat16(), torch.empty(3, 2, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=r"x must be a bfloat16 \[3, 9\] CPU tensor, got torch.float32"):
        kernel("lora_down")(x.float(), [torch.randn(2, 9)], out)
    with pytest.raises(KernelError, match="x must have contiguous rows, its columns are 3 elements apart"):
        kernel("lora_down")(x.t().contiguous().t(), [torch.randn(2, 9)], out)
    with pytest.raises(KernelError, match=r"lora_a must be a contiguous float32 or bfloat16 \[2, 9\]"):
        kernel("lora_down")(x, [torch.randn(9, 2).t()], out)
    with pytest.raises(KernelError, match="out must be contiguous"):
        kernel("lora_down")(x, [torch.randn(2, 9)], torch.empty(3, 4, dtype=torch.bfloat16)[:, :2])
    with pytest.raises(KernelError, match=r"h must be a bfloat16 \[5, 2\]"):
        kernel("lora_up")(out, torch.randn(9, 2), 1.0, torch.empty(5, 9, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match=r"da must be a contiguous float32 or bfloat16 \[2, 4\]"):
        grads = (torch.empty(2, 5), None)
        x4 = torch.randn(3, 4).bfloat16()
        kernel("lora_backward")(x, x4, out, torch.randn(9, 2), 1.0, torch.empty_like(out), *grads)


# --- the ops that call them -------------------------------------------------------------------------------------------


def run_ops(master: torch.dtype, need_adapters: bool = True) -> list[Tensor]:
    """Forward and backward of a group of two linears (N 37 and 70, K 96) with 1 and 2 adapters, M = 2 x 13."""
    gen = torch.Generator().manual_seed(3)
    ns, k, ranks = (37, 70), 96, (5, 3, 17)
    data = [nf4.quantize_reference(torch.randn(n, k, generator=gen), "nf4", 32, True) for n in ns]
    weights = [[part[i] for part in data] for i in range(4)]
    lora_a = [torch.randn(r, k, generator=gen).to(master) for r in ranks]
    lora_b = [torch.randn(n, r, generator=gen).to(master) for n, r in zip((37, 70, 70), ranks, strict=True)]
    scaling = [torch.tensor(s) for s in (1.0, -0.5, 2.0)]
    rest = (lora_a, lora_b, scaling, [0.5, 1.0, 0.25], [1, 2], [], 0.0, list(ns), "nf4", 32, torch.bfloat16)
    x = torch.randn(2, 13, k, generator=gen).bfloat16()
    outs = torch.ops.qlora.lora_linear(x, *weights, [], *rest, "library_gemm", "")  # "codes" has them in its own kernel
    # the gradient of a sum: one value, all strides 0
    grads = [torch.randn(2, 13, 37, generator=gen).bfloat16(), torch.tensor(0.75).bfloat16().expand(2, 13, 70)]
    back = torch.ops.qlora.lora_linear_backward(grads, x, outs[-1], *weights, *rest, True, need_adapters)
    return [*outs, *back]


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16, torch.float16])
def test_ops_agree_with_their_reference(master: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    find = lora_group.kernel_for

    def counting(op: str, device: torch.device) -> Callable[..., Any] | None:
        calls.append(op)
        return find(op, device)

    monkeypatch.setattr(lora_group, "kernel_for", counting)
    mine = run_ops(master)
    used = {"lora_down", "lora_up", "lora_backward"}
    assert used <= set(calls) if master != torch.float16 else not used & set(calls)
    assert len(run_ops(master, need_adapters=False)) == len(mine) - 6
    monkeypatch.setattr(lora_group, "kernel_for", lambda op, device: None if op in used else find(op, device))
    reference = run_ops(master)
    assert [t.dtype for t in mine] == [t.dtype for t in reference]
    for a, b in zip(mine, reference, strict=True):
        # The reference rounds to bf16 up to three times where the kernels round once: 2^-7 of the largest value.
        assert (a.double() - b.double()).abs().max() <= 2**-7 * b.double().abs().max()
