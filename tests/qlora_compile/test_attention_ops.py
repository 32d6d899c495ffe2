"""Attention as an op, by every kernel, against fp64; that it shares key heads without copies; the op's contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_compile import attention_ops
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, devices, dispatch

OPS = torch.ops.qlora
KERNELS = ["fp32", "flash", "flash_fp32"]  # the generated ones are the plain-torch body where the machine has none
HALVES = [torch.bfloat16, torch.float16]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float) -> None:
    """`roundings` of half a unit relative to the value, and beside the largest value fp32 sums of some hundred terms and
    what roundings of factors leave: a sum of many rounded terms errs by some units of its largest ones."""
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    tolerance = expected.abs() * unit * roundings + expected.abs().max() * (2**-16 + unit * (roundings - 1))
    assert ((got.double() - expected).abs() <= tolerance).all(), float((got.double() - expected).abs().max())


def case(mask: str, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor | None, bool]:
    """q, k, v with other sizes each, six query heads to two key heads, q strided; one query that sees nothing."""
    torch.manual_seed(2)
    q = torch.randn(2, 21, 6, 8).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 17, 8).to(dtype), torch.randn(2, 2, 17, 5).to(dtype)
    hidden = torch.rand(2, 1, 21, 17) > 0.3
    hidden[0, 0, 3] = False
    found = {"none": None, "causal": None, "bool": hidden, "added": torch.randn(21, 17)}[mask]
    return [t.requires_grad_() for t in (q, k, v)], found, mask == "causal"


def reference(inputs: list[Tensor], mask: Tensor | None, causal: bool, dout: Tensor) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) in fp64."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    added = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    out = F.scaled_dot_product_attention(*wide, attn_mask=added, is_causal=causal, scale=0.3, enable_gqa=True)
    return out.detach(), *torch.autograd.grad(out, wide, dout.double())


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_attention(mask: str, kernel: str, dtype: torch.dtype) -> None:
    inputs, given, causal = case(mask, dtype)
    out, logsumexp = OPS.attention(*inputs, given, causal, 0.3, kernel)
    assert logsumexp.dtype == torch.float32 and not logsumexp.requires_grad
    assert out.transpose(1, 2).is_contiguous()
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    expected = reference(inputs, given, causal, dout)
    rounds_factors = kernel == "flash" and dtype == torch.bfloat16
    close(out, expected[0], dtype, roundings=2 if rounds_factors else 1)
    for got, want in zip(grads, expected[1:]):
        close(got, want, dtype, roundings=4 if rounds_factors else 2)  # backward reads the rounded output
    if mask == "bool":
        assert (out[0, :, 3] == 0).all() and (grads[0][0, :, 3] == 0).all()
        assert (logsumexp[0, :, 3] == -math.inf).all()


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("scores", [300, 40])
def test_attention_in_fp32_by_blocks(mask: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of a head, and two queries at a time, give what all at once gives."""
    inputs, given, causal = case(mask)
    dout = torch.randn(2, 6, 21, 5).bfloat16()
    whole = OPS.attention(*inputs, given, causal, 0.3, "fp32")
    grads = torch.autograd.grad(whole[0], inputs, dout)
    monkeypatch.setattr(attention_ops, "SCORES", scores)
    parts = OPS.attention(*inputs, given, causal, 0.3, "fp32")
    torch.testing.assert_close(parts, whole, atol=2**-12, rtol=2**-8)  # one rounding apart
    for got, want in zip(torch.autograd.grad(parts[0], inputs, dout), grads):
        torch.testing.assert_close(got, want, atol=2**-6, rtol=2**-7)  # some sums are of rounded results


@pytest.mark.parametrize("kernel", KERNELS)
def test_operands_as_autograd_hands_them_over(kernel: str) -> None:
    """The gradient of a sum has stride 0; k lies transposed in memory."""
    inputs, _, _ = case("none")
    q, k, v = (t.detach() for t in inputs)
    k = k.mT.contiguous().mT
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = OPS.attention(*inputs, None, True, 0.3, kernel)[0]
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = reference(inputs, None, True, torch.ones_like(out))
    for got, want in zip((out, *grads), expected):
        close(got, want, torch.bfloat16, roundings=6)  # equal gradients all along: dP - delta cancels
    for got, given in zip(grads, inputs):
        assert got.stride() == given.stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("queries", "keys"), [(0, 17), (21, 0), (0, 0)])
def test_no_queries_and_no_keys(kernel: str, queries: int, keys: int) -> None:
    """Zeros for queries that see nothing, as for a mask that hides all; also with gradients of stride 0."""
    q, k, v = (t.detach() for t in case("none")[0])
    inputs = [t.requires_grad_() for t in (q[:, :, :queries], k[:, :, :keys], v[:, :, :keys])]
    out, logsumexp = OPS.attention(*inputs, torch.ones(queries, 1, dtype=torch.bool), False, 0.3, kernel)
    assert out.shape == (2, 6, queries, 5) and not out.any()
    assert keys or (logsumexp == -math.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: str) -> None:
    inputs, mask, causal = case("bool")
    torch.library.opcheck(OPS.attention.default, (*inputs, mask, causal, 0.3, kernel))
    out, logsumexp = (t.detach() for t in OPS.attention(*inputs, mask, causal, 0.3, kernel))
    q, k, v = (t.detach() for t in inputs)
    torch.library.opcheck(
        OPS.attention_backward.default, (torch.randn_like(out), q, k, v, out, logsumexp, mask, causal, 0.3, kernel)
    )


@pytest.mark.parametrize("kernel", ["fp32", "flash_fp32"])
def test_fp32_gradients_by_gradcheck(kernel: str) -> None:
    """On fp32 tensors: its backward is the derivative of its forward."""
    inputs = [t.detach().float().requires_grad_() for t in case("none")[0]]
    assert torch.autograd.gradcheck(
        lambda q, k, v: OPS.attention(q, k, v, None, True, 0.3, kernel)[0],
        inputs, eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=True,  # fp32: differences of 1e-2 lose 5 of 24 bits
    )  # fmt: skip


def test_saved_are_the_key_heads_before_they_are_shared() -> None:
    inputs, mask, causal = case("bool")
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        OPS.attention(*inputs, mask, causal, 0.3, "fp32")
    shapes = {tuple(t.shape) for t in saved}
    assert {(2, 2, 17, 8), (2, 2, 17, 5), (2, 6, 21)} <= shapes and (2, 6, 17, 8) not in shapes


def test_flash_is_the_default_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.find("attention_forward", "cpu") is None:
        pytest.skip("needs a C++ compiler and AVX-512 BF16")
    sizes = {"n": (256,), "k": 64, "device": "cpu"}
    monkeypatch.setattr(dispatch, "table", lambda device: ())
    for kind, name in (("cpu-avx512_bf16", "flash"), ("cpu-amx", "library")):
        monkeypatch.setattr(devices, "kind", lambda device, kind=kind: kind)
        dispatch.forget_choices()
        assert kernels.choose_kernel("attention", rows=256, dtype=torch.bfloat16, **sizes).name == name
    dispatch.forget_choices()


def test_fp32_products_by_blocks_are_the_default_where_nothing_narrower_is_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cpp_build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(dispatch, "table", lambda device: ())
    for kind, native, dtype, name in (
        ("cpu-avx2", False, torch.bfloat16, "flash_fp32"),
        ("cpu-avx512", False, torch.float16, "flash_fp32"),
        ("cpu-avx512_bf16", True, torch.float32, "flash_fp32"),
        ("cpu-amx", True, torch.bfloat16, "library"),
        ("cpu", False, torch.bfloat16, "fp32"),  # the portable path is slower than torch's own products may be
        ("cpu", False, torch.float32, "library"),
        ("cpu-avx2", False, torch.float64, "library"),
    ):
        monkeypatch.setattr(devices, "kind", lambda device, kind=kind: kind)
        monkeypatch.setattr(devices, "multiplies_natively", lambda dtype, native=native: native)
        dispatch.forget_choices()
        chosen = kernels.choose_kernel("attention", rows=256, dtype=dtype, n=(256,), k=64, device="cpu")
        assert chosen.name == name, (kind, dtype)
    dispatch.forget_choices()


@pytest.mark.parametrize(
    ("kernel", "dtype", "rows", "size", "reason"),
    [
        ("flash", torch.float16, 256, 64, "for bf16 only"),
        ("flash", torch.bfloat16, 8, 64, "for 16 queries or more"),
        ("flash", torch.bfloat16, 256, 1024, "heads of at most 512"),
        ("flash_fp32", torch.float64, 256, 64, "for fp32, bf16 and fp16"),
        ("flash_fp32", torch.float32, 8, 64, "for 16 queries or more"),
        ("flash_fp32", torch.float16, 256, 1024, "heads of at most 512"),
    ],
)
def test_why_a_generated_kernel_declines(kernel: str, dtype: torch.dtype, rows: int, size: int, reason: str) -> None:
    (candidate,) = (c for c in dispatch.candidates("attention", "cpu") if c.name == kernel)
    problem = dispatch.Problem("attention", rows, (256,), size, 0, dtype)
    assert reason in str(candidate.declines(problem))
