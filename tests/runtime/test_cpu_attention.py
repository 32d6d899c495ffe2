"""The generated C++ attention against fp64: odd sizes, masks, groups, strides, every output guarded; bad operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build

available = cpp_build.find_compiler() is not None and kernels.find("attention_forward", "cpu") is not None
pytestmark = pytest.mark.skipif(not available, reason="needs a C++ compiler and AVX-512 BF16")
GUARD = 7.0  # around every output, to see a write outside


def kernel(name: str) -> Callable[..., Any]:
    found = kernels.find(name, "cpu")
    assert found is not None
    return found


def guarded(b: int, h: int, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """(an output [B, H, rows, size], heads of one row side by side; the wider tensor that it is a part of)"""
    wide = torch.full((b, rows, h, size + 3), GUARD, dtype=torch.bfloat16)
    return wide[..., 1 : 1 + size].transpose(1, 2), wide


def untouched(wide: Tensor) -> bool:
    return bool((wide[..., 0] == GUARD).all() and (wide[..., -2:] == GUARD).all())


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dout: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv], none written past its ends."""
    outs = [guarded(*t.shape) for t in (dout, q, k, v)]
    out, dq, dk, dv = (t for t, _ in outs)
    logsumexp = torch.empty(q.shape[:3])
    kernel("attention_forward")(q, k, v, mask, causal, 0.2, out, logsumexp)
    kernel("attention_backward")(dout, q, k, v, out, logsumexp, mask, causal, 0.2, dq, dk, dv)
    assert all(untouched(wide) for _, wide in outs)
    return [out, dq, dk, dv]


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dout: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] in fp64, by torch."""
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    added = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    out = F.scaled_dot_product_attention(*wide, attn_mask=added, is_causal=causal, scale=0.2, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, wide, dout.double())]


def magnitudes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of `expected` with every factor's magnitude in its place: what rounding a factor errs by a part of."""
    group = q.shape[1] // k.shape[1]
    q, k, v, dout = (t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout))
    scores = 0.2 * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    p = scores.softmax(-1).nan_to_num(0)
    q, k, v, dout = (t.abs() for t in (q, k, v, dout))
    out = p @ v
    ds = 0.2 * p * (dout @ v.mT + (dout * out).sum(-1, keepdim=True))
    per_head = [ds.mT @ q, p.mT @ dout]
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in per_head)
    return out, ds @ k, dk, dv


def make_mask(kind: str, b: int, heads: int, queries: int, keys: int, gen: torch.Generator) -> Tensor | None:
    if kind in ("none", "causal"):
        return None
    bools = torch.rand(b, 1, queries, keys, generator=gen) < 0.6
    if kind == "blocks":  # whole blocks of 64 keys unseen or seen
        bools = (torch.arange(keys) // 64 <= torch.arange(queries)[:, None] // 64).expand(b, 1, -1, -1)
    if kind in ("bool", "blocks"):
        return bools.expand(-1, heads, -1, -1)
    by_head = torch.randn(heads, queries, keys, generator=gen)
    by_head = by_head.masked_fill(~bools[0], -torch.inf)
    return by_head.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]).expand(
        b, -1, -1, -1
    )


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 2), kv=st.integers(1, 3), group=st.integers(1, 3),
    queries=st.one_of(st.integers(1, 70), st.integers(1, 300)), keys=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    size=st.integers(1, 100), size_of_value=st.integers(1, 100),
    kind=st.sampled_from(["none", "causal", "bool", "blocks", "fp32", "bf16", "fp16"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_against_fp64(
    b: int, kv: int, group: int, queries: int, keys: int, size: int, size_of_value: int, kind: str, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(b, queries, kv * group, size + 1, generator=gen).bfloat16()[..., 1:].transpose(1, 2)
    k = torch.randn(b, keys, kv, size + 4, generator=gen).bfloat16()[..., 2:-2].transpose(1, 2)
    v = torch.randn(b, kv, keys, size_of_value, generator=gen).bfloat16()
    dout = torch.randn(b, kv * group, queries, size_of_value, generator=gen).bfloat16()
    mask = make_mask(kind, b, kv * group, queries, keys, gen)
    got, want = run(q, k, v, mask, kind == "causal", dout), expected(q, k, v, mask, kind == "causal", dout)
    # Each rounding to bf16 errs by at most 2^-8: of P and of the result for out and dv; for dq and dk of dS, of the result
    # and twice (P, out) within delta. fp32 sums and 2^x are 2^-7 finer still.
    parts = (2**-7, 2**-6, 2**-6, 2**-7)
    for ours, theirs, whole, part in zip(got, want, magnitudes(q, k, v, mask, kind == "causal", dout), parts):
        excess = (ours.double() - theirs).abs() - whole * part * 1.05
        assert (excess <= 1e-30).all(), float(excess.max())


def test_more_key_heads_than_are_summed_at_a_time() -> None:
    """21 key heads: they take turns, and none is left out."""
    gen = torch.Generator().manual_seed(6)
    q, dout = (torch.randn(7, 6, 70, 16, generator=gen).bfloat16() for _ in range(2))
    k, v = (torch.randn(7, 3, 70, 16, generator=gen).bfloat16() for _ in range(2))
    got, want = run(q, k, v, None, True, dout), expected(q, k, v, None, True, dout)
    for ours, theirs, whole in zip(got, want, magnitudes(q, k, v, None, True, dout)):
        assert ((ours.double() - theirs).abs() <= whole * 2**-6 * 1.05 + 1e-30).all()  # as in test_against_fp64


def test_exact_where_arithmetic_is_exact() -> None:
    """Scores so far apart that each query reads one key: every position of every packing is checked bit for bit."""
    keys, size = 130, 8
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(3))
    bits = torch.tensor([[1.0 if number >> i & 1 else -1.0 for i in range(size)] for number in range(keys)])
    k = bits.bfloat16()[None, None] * 16
    q = k[:, :, order].clone()
    v = torch.randn(1, 1, keys, 33).bfloat16()
    out, logsumexp = torch.empty(1, 1, keys, 33, dtype=torch.bfloat16), torch.empty(1, 1, keys)
    kernel("attention_forward")(q, k, v, None, False, 1.0, out, logsumexp)
    assert torch.equal(out, v[:, :, order])
    assert torch.equal(logsumexp, torch.full_like(logsumexp, 8 * 256.0))


def test_a_mask_that_hides_everything_by_a_finite_number() -> None:
    """As the lowest finite number does where a mask is made by addition: no NaN, a softmax over what is hidden."""
    gen = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=gen).bfloat16() for _ in range(3))
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 5, :] = torch.finfo(torch.float32).min
    mask[..., 6, 3:] = torch.finfo(torch.float32).min
    mask[..., 7, :] = -torch.inf
    out, dq, dk, dv = run(q, k, v, mask, False, torch.ones_like(v))
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    assert (out[0, 0, 7] == 0).all() and (dq[0, 0, 7] == 0).all() and out[0, 0, 5].abs().sum() > 0
    want = expected(q, k, v, mask, False, torch.ones_like(v))[0]
    assert (out[0, 0, 6].double() - want[0, 0, 6]).abs().max() <= 2**-7


def test_nan_stays() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16).bfloat16() for _ in range(3))
    q[0, 0, 66] = torch.nan
    out = run(q, k, v, None, False, torch.ones_like(v))[0]
    assert out[0, 0, 66].isnan().all() and out[0, 0, :66].isfinite().all()


def test_no_bit_depends_on_the_threads() -> None:
    gen = torch.Generator().manual_seed(5)
    q, dout = (torch.randn(1, 6, 200, 40, generator=gen).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 2, 200, 40, generator=gen).bfloat16() for _ in range(2))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(q, k, v, None, True, dout))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("shape", [(0, 4, 20, 8), (2, 4, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    q = torch.empty(shape, dtype=torch.bfloat16)
    k = torch.randn(shape[0], 2, 9, 8).bfloat16()
    out, dq, dk, dv = run(q, k, k, None, False, torch.empty_like(q))
    assert out.shape == dq.shape == shape and (dk == 0).all() and (dv == 0).all()


def test_operands_that_the_kernel_cannot_read() -> None:
    q, out, logsumexp = torch.randn(1, 4, 20, 8).bfloat16(), torch.empty(1, 4, 20, 8).bfloat16(), torch.empty(1, 4, 20)
    forward = kernel("attention_forward")

    def call(q: Tensor = q, k: Tensor = q, mask: Tensor | None = None, logsumexp: Tensor = logsumexp) -> None:
        forward(q, k, k, mask, False, 1.0, out, logsumexp)

    with pytest.raises(KernelError, match=r"k must be a bfloat16 \[1, 4, 20, 8\] CPU tensor, got torch.float32"):
        call(k=q.float())
    with pytest.raises(KernelError, match="q must have contiguous rows, its elements are 20 apart"):
        call(q=q.mT.contiguous().mT)
    with pytest.raises(KernelError, match="4 query heads cannot share 3 key heads"):
        call(k=q[:, :3])
    with pytest.raises(KernelError, match="mask must be a boolean or float CPU tensor"):
        call(mask=torch.ones(1, 4, 20, 20, dtype=torch.int64))
    with pytest.raises(KernelError, match="logsumexp must be contiguous fp32"):
        call(logsumexp=logsumexp.double())
