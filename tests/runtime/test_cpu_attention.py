"""The generated C++ attentions against fp64: odd sizes, masks, groups, strides, every output guarded; bad operands.

`attention` multiplies in bf16, `wide_attention` in fp32 by one of several instruction sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu

pytestmark = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")
GUARD = 7.0  # around every output, to see a write outside
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of the last place


class Kernel(NamedTuple):
    """A kernel's prefix, instruction set ("" for the one that the kernel has) and the dtype to try it with."""

    prefix: str
    isa: str
    dtype: torch.dtype

    def function(self, direction: str) -> Callable[..., Any]:
        found = kernels.find(f"{self.prefix}_{direction}", "cpu")
        if found is None or (self.isa and self.isa not in cpu.supported_isas()):
            pytest.skip(f"this machine cannot run {self.prefix} {self.isa}")
        return found

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dout: Tensor) -> list[Tensor]:
        """[out, dq, dk, dv], none written past its ends."""
        outs = [guarded(t) for t in (dout, q, k, v)]
        out, dq, dk, dv = (t for t, _ in outs)
        logsumexp, isa = torch.empty(q.shape[:3]), [self.isa] if self.isa else []
        self.function("forward")(q, k, v, mask, causal, 0.2, out, logsumexp, *isa)
        self.function("backward")(dout, q, k, v, out, logsumexp, mask, causal, 0.2, dq, dk, dv, *isa)
        assert all(untouched(wide) for _, wide in outs)
        return [out, dq, dk, dv]

    def tolerances(self) -> Iterator[tuple[float, float]]:
        """For out, dq, dk and dv: how many times the result itself, and the sum of magnitudes, the error may be."""
        if self.prefix == "attention":
            # Each rounding to bf16 errs by at most 2^-8: of P and of the result for out and dv; for dq and dk of dS, of
            # the result and twice (P, out) within delta. fp32 sums and 2^x are 2^-7 finer still.
            return iter((0.0, part * 1.05) for part in (2**-7, 2**-6, 2**-6, 2**-7))
        # One rounding of the result. A score is an fp32 sum of up to 100 products with some 20 as its magnitude, which
        # 2^x turns into a relative error of up to 100 * 20 * 2^-24. Within delta, dq and dk have the rounded out.
        half, sums = UNIT[self.dtype] / 2, 2**-13
        return iter(((half, sums), (half, half + sums), (half, half + sums), (half, sums)))


BF16 = Kernel("attention", "", torch.bfloat16)
WIDE = [Kernel("wide_attention", isa, dtype) for isa in ("avx512", "avx2", "portable") for dtype in UNIT]
every_kernel = pytest.mark.parametrize("kernel", [BF16, *WIDE], ids=lambda k: "-".join(map(str, k)))
every_path = pytest.mark.parametrize(
    "kernel", [BF16, *(k for k in WIDE if k.dtype == torch.bfloat16)], ids=lambda k: "-".join(map(str, k))
)


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """(an output [B, H, rows, size], heads of one row side by side; the wider tensor that it is a part of)"""
    b, h, rows, size = like.shape
    wide = torch.full((b, rows, h, size + 3), GUARD, dtype=like.dtype)
    return wide[..., 1 : 1 + size].transpose(1, 2), wide


def untouched(wide: Tensor) -> bool:
    return bool((wide[..., 0] == GUARD).all() and (wide[..., -2:] == GUARD).all())


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


@every_kernel
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 2), kv=st.integers(1, 3), group=st.integers(1, 3),
    queries=st.one_of(st.integers(1, 70), st.integers(1, 300)), keys=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    size=st.integers(1, 100), size_of_value=st.integers(1, 100),
    kind=st.sampled_from(["none", "causal", "bool", "blocks", "fp32", "bf16", "fp16"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_against_fp64(
    kernel: Kernel, b: int, kv: int, group: int, queries: int, keys: int, size: int, size_of_value: int, kind: str, seed: int
) -> None:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(b, queries, kv * group, size + 1, generator=gen).to(kernel.dtype)[..., 1:].transpose(1, 2)
    k = torch.randn(b, keys, kv, size + 4, generator=gen).to(kernel.dtype)[..., 2:-2].transpose(1, 2)
    v = torch.randn(b, kv, keys, size_of_value, generator=gen).to(kernel.dtype)
    dout = torch.randn(b, kv * group, queries, size_of_value, generator=gen).to(kernel.dtype)
    mask = make_mask(kind, b, kv * group, queries, keys, gen)
    operands = q, k, v, mask, kind == "causal", dout
    got, want = kernel.run(*operands), expected(*operands)
    for ours, theirs, whole, (of_result, of_sum) in zip(got, want, magnitudes(*operands), kernel.tolerances()):
        excess = (ours.double() - theirs).abs() - theirs.abs() * of_result - whole * of_sum
        # fp16's numbers below 2^-14 are 2^-24 apart
        assert (excess <= (2**-25 if kernel.dtype == torch.float16 else 1e-30)).all(), float(excess.max())


@every_path
def test_more_key_heads_than_are_summed_at_a_time(kernel: Kernel) -> None:
    """21 key heads: they take turns, and none is left out."""
    gen = torch.Generator().manual_seed(6)
    q, dout = (torch.randn(7, 6, 70, 16, generator=gen).bfloat16() for _ in range(2))
    k, v = (torch.randn(7, 3, 70, 16, generator=gen).bfloat16() for _ in range(2))
    operands = q, k, v, None, True, dout
    for ours, theirs, whole in zip(kernel.run(*operands), expected(*operands), magnitudes(*operands)):
        assert ((ours.double() - theirs).abs() <= whole * 2**-6 * 1.05 + 1e-30).all()  # as BF16.tolerances


@every_path
def test_exact_where_arithmetic_is_exact(kernel: Kernel) -> None:
    """Scores so far apart that each query reads one key: every position of every packing is checked bit for bit."""
    keys, size = 130, 8
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(3))
    bits = torch.tensor([[1.0 if number >> i & 1 else -1.0 for i in range(size)] for number in range(keys)])
    k = bits.bfloat16()[None, None] * 16
    q = k[:, :, order].clone()
    v = torch.randn(1, 1, keys, 33).bfloat16()
    out, logsumexp = torch.empty(1, 1, keys, 33, dtype=torch.bfloat16), torch.empty(1, 1, keys)
    kernel.function("forward")(q, k, v, None, False, 1.0, out, logsumexp, *([kernel.isa] if kernel.isa else []))
    assert torch.equal(out, v[:, :, order])
    assert torch.equal(logsumexp, torch.full_like(logsumexp, 8 * 256.0))


@every_path
def test_a_mask_that_hides_everything_by_a_finite_number(kernel: Kernel) -> None:
    """As the lowest finite number does where a mask is made by addition: no NaN, a softmax over what is hidden."""
    gen = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, 40, 16, generator=gen).bfloat16() for _ in range(3))
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 5, :] = torch.finfo(torch.float32).min
    mask[..., 6, 3:] = torch.finfo(torch.float32).min
    mask[..., 7, :] = -torch.inf
    out, dq, dk, dv = kernel.run(q, k, v, mask, False, torch.ones_like(v))
    assert all(t.isfinite().all() for t in (out, dq, dk, dv))
    assert (out[0, 0, 7] == 0).all() and (dq[0, 0, 7] == 0).all() and out[0, 0, 5].abs().sum() > 0
    want = expected(q, k, v, mask, False, torch.ones_like(v))[0]
    assert (out[0, 0, 6].double() - want[0, 0, 6]).abs().max() <= 2**-7


@every_path
def test_nan_stays(kernel: Kernel) -> None:
    q, k, v = (torch.randn(1, 1, 70, 16).bfloat16() for _ in range(3))
    q[0, 0, 66] = torch.nan
    out = kernel.run(q, k, v, None, False, torch.ones_like(v))[0]
    assert out[0, 0, 66].isnan().all() and out[0, 0, :66].isfinite().all()


@every_path
def test_no_bit_depends_on_the_threads(kernel: Kernel) -> None:
    gen = torch.Generator().manual_seed(5)
    q, dout = (torch.randn(1, 6, 200, 40, generator=gen).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, 2, 200, 40, generator=gen).bfloat16() for _ in range(2))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(kernel.run(q, k, v, None, True, dout))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@every_path
@pytest.mark.parametrize("shape", [(0, 4, 20, 8), (2, 4, 0, 8)])
def test_empty(kernel: Kernel, shape: tuple[int, ...]) -> None:
    q = torch.empty(shape, dtype=torch.bfloat16)
    k = torch.randn(shape[0], 2, 9, 8).bfloat16()
    out, dq, dk, dv = kernel.run(q, k, k, None, False, torch.empty_like(q))
    assert out.shape == dq.shape == shape and (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("kernel", [BF16, WIDE[-1]], ids=lambda k: k.prefix)
def test_operands_that_the_kernel_cannot_read(kernel: Kernel) -> None:
    q, out, logsumexp = torch.randn(1, 4, 20, 8).bfloat16(), torch.empty(1, 4, 20, 8).bfloat16(), torch.empty(1, 4, 20)
    forward = kernel.function("forward")

    def call(q: Tensor = q, k: Tensor = q, mask: Tensor | None = None, logsumexp: Tensor = logsumexp) -> None:
        forward(q, k, k, mask, False, 1.0, out, logsumexp)

    with pytest.raises(KernelError, match=r"k must be a bfloat16 \[1, 4, 20, 8\] CPU tensor, got torch.float32"):
        call(k=q.float())
    with pytest.raises(KernelError, match="q must have contiguous rows, its elements are 20 apart"):
        call(q=q.mT.contiguous().mT)
    with pytest.raises(KernelError, match=r"q must be .*bfloat16.*, got torch.float64"):
        call(q=q.double())
    with pytest.raises(KernelError, match="4 query heads cannot share 3 key heads"):
        call(k=q[:, :3])
    with pytest.raises(KernelError, match="mask must be a boolean or float CPU tensor"):
        call(mask=torch.ones(1, 4, 20, 20, dtype=torch.int64))
    with pytest.raises(KernelError, match="logsumexp must be contiguous fp32"):
        call(logsumexp=logsumexp.double())
    if kernel.isa:
        with pytest.raises(KernelError, match="no instruction set 'sse9'"):
            forward(q, q, q, None, False, 1.0, out, logsumexp, "sse9")
