"""lora_linear and its backward computed in fp32 (the kernels `fp32_gemm`, `fused_fp32` and, for few rows, `codes_fp32`),
against fp64 sums over the same 4-bit weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_compile import lora_group, nf4, ops  # noqa: F401  defines torch.ops.qlora
from qlora_compile.runtime.kernels import cpp_build, cpu_gemm, devices, dispatch, lora_kernels

K, NS, RANKS = 192, (320, 72), (8, 5)


Case = tuple[Tensor, list[Tensor], list[Tensor], list[list[Tensor]]]


def case(dtype: torch.dtype, quant_type: str, *, seed: int) -> Case:
    """x [3, 11, K] with strided rows, trainable A and B of two linears, and the arguments that give their weights."""
    torch.manual_seed(seed)
    x = torch.randn(3, 11, K + 7)[..., 7:].to(dtype).requires_grad_()
    a = [torch.randn(r, K).mul_(0.2).requires_grad_() for r in RANKS]
    b = [torch.randn(n, r).mul_(0.2).requires_grad_() for n, r in zip(NS, RANKS)]
    dense = [torch.randn(n, K) for n in NS]
    if quant_type == "none":
        return x, a, b, [[w.to(dtype) for w in dense], [], [], []]
    data = [nf4.quantize_reference(w, quant_type, 64, True) for w in dense]
    return x, a, b, [[d[i] for d in data] for i in range(4)]  # type: ignore[misc]


def run(kernel: str, x: Tensor, a: list[Tensor], b: list[Tensor], weights: list[list[Tensor]], bias: list[Tensor],
        dtype: torch.dtype, quant_type: str, dropout: float = 0.0) -> list[Tensor]:  # fmt: skip
    seeds = [torch.tensor(5), torch.tensor(6)] if dropout else []
    scaling = [torch.tensor(0.5), torch.tensor(-1.5)]
    return torch.ops.qlora.lora_linear(
        x, *weights, bias, a, b, scaling, [2.0, 1.0], [1, 1], seeds, dropout, NS, quant_type, 64, dtype, kernel, kernel
    )


def reference(x: Tensor, a: list[Tensor], b: list[Tensor], weights: list[list[Tensor]], bias: list[Tensor],
              quant_type: str) -> list[Tensor]:  # fmt: skip
    out = []
    for i, n in enumerate(NS):
        parts = [part[i] for part in weights if part]
        w = (
            parts[0]
            if quant_type == "none"
            else nf4.dequantize_reference(*parts, (n, K), quant_type, 64, torch.float32)
        )
        y = x @ w.double().t() + (bias[i].double() if bias else 0)
        out.append(y + (x @ a[i].t()) @ b[i].t() * (1.0, -1.5)[i])
    return out


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, extra: float = 0.0) -> None:
    """One rounding to `dtype` (2^-8, or 2^-11 for fp16) of values up to `expected`'s largest, and fp32 sums below that."""
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    tolerance = expected.abs() * (unit + extra) + expected.abs().max() * (2**-16 + extra)
    assert ((got.double() - expected).abs() <= tolerance).all(), float((got.double() - expected).abs().max())


every_kernel = pytest.mark.parametrize(
    "kernel",
    [
        "fp32_gemm",
        pytest.param("fused_fp32", marks=pytest.mark.skipif(bool(cpu_gemm.declines()), reason="cannot run here")),
    ],
)


@every_kernel
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2048, 7])
def test_forward_and_gradients_are_rounded_once(
    dtype: torch.dtype, quant_type: str, rows: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with fewer rows at a time than there are (7 of 33)."""
    monkeypatch.setattr(lora_group, "ROWS", rows)
    x, a, b, weights = case(dtype, quant_type, seed=rows)
    bias = [torch.randn(n).to(dtype) for n in NS] if rows == 7 else []
    *ys, h = run(kernel, x, a, b, weights, bias, dtype, quant_type)
    assert h.dtype == dtype and h.shape == (33, sum(RANKS))
    wide = [t.detach().double().requires_grad_() for t in (x, *a, *b)]
    xs, as_, bs = wide[0], wide[1:3], wide[3:]
    expected = reference(xs, as_, bs, weights, bias, quant_type)
    dys = [torch.randn_like(y) for y in ys]
    grads = torch.autograd.grad(ys, [x, *a, *b], dys)
    wanted = torch.autograd.grad(expected, wide, [dy.double() for dy in dys])
    for got, want in zip(ys, expected):
        close(got, want.detach(), dtype)
    close(grads[0], wanted[0], dtype)
    for got, want in zip(grads[1:3], wanted[1:3]):  # dA: all of it in fp32
        close(got, want, torch.float16)
    for got, want in zip(grads[3:], wanted[3:]):  # dB: h was stored in `dtype`
        close(got, want, dtype, extra=2**-8)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_rows_straight_from_the_codes(dtype: torch.dtype, quant_type: str) -> None:
    if cpp_build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    x, a, b, weights = case(dtype, quant_type, seed=1)
    x = x.detach()[:1, :9].requires_grad_()
    bias = [torch.randn(n).to(dtype) for n in NS]
    *ys, h = run("codes_fp32", x, a, b, weights, bias, dtype, quant_type)
    assert h.dtype == dtype and h.shape == (9, sum(RANKS))
    wide = [t.detach().double().requires_grad_() for t in (x, *a, *b)]
    expected = reference(wide[0], wide[1:3], wide[3:], weights, bias, quant_type)
    for got, want in zip(ys, expected):
        close(got, want.detach(), dtype)
    dys = [torch.randn_like(y) for y in ys]
    grads = torch.autograd.grad(ys, [x, *a, *b], dys)  # by the kernel that backward has: it reads h as it was stored
    wanted = torch.autograd.grad(expected, wide, [dy.double() for dy in dys])
    for got, want in zip(grads, wanted):
        close(got, want, dtype, extra=2**-6 if dtype != torch.float32 else 2**-18)


def test_it_is_the_choice_for_few_rows_where_nothing_narrower_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpp_build.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(dispatch, "table", lambda device: ())
    problem = dispatch.Problem("lora_linear", 1, (320,), K, 8, torch.bfloat16, "nf4", 64)
    monkeypatch.setattr(devices, "multiplies_natively", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(lora_kernels.cpu_linear, "declines_small", lambda dtype: "this machine has no AVX-512 BF16")
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            dispatch.forget_choices()
            assert dispatch.choose(problem._replace(dtype=dtype)).name == "codes_fp32"
            assert dispatch.choose(problem._replace(dtype=dtype, m=16)).name == "codes_fp32"
            assert dispatch.choose(problem._replace(dtype=dtype, m=32)).name != "codes_fp32"
            assert dispatch.choose(problem._replace(dtype=dtype, k=200)).name != "codes_fp32"  # no whole blocks
            assert dispatch.choose(problem._replace(dtype=dtype, dropout=True)).name != "codes_fp32"
    finally:
        dispatch.forget_choices()


@every_kernel
def test_it_agrees_with_the_library_under_dropout(kernel: str) -> None:
    """Same seeds, same masks; the library's way rounds h, the weight and each product to bf16."""
    x, a, b, weights = case(torch.bfloat16, "nf4", seed=3)
    results = []
    for name in (kernel, "library_gemm"):
        ys = run(name, x, a, b, weights, [], torch.bfloat16, "nf4", dropout=0.25)[:-1]
        results.append([*ys, *torch.autograd.grad([y.float().square().sum() for y in ys], [x, *a, *b])])
    for got, want in zip(*results):
        # some ten roundings of 2^-9 add up in the gradient of a square
        assert (got - want).abs().max() <= want.abs().max() * 2**-5


@every_kernel
def test_no_rows_and_what_is_not_needed(kernel: str) -> None:
    x, a, b, weights = case(torch.bfloat16, "nf4", seed=4)
    ys = run(kernel, x[:, :0], a, b, weights, [], torch.bfloat16, "nf4")[:-1]
    assert [tuple(y.shape) for y in ys] == [(3, 0, n) for n in NS]
    ys = run(kernel, x, [t.detach() for t in a], [t.detach() for t in b], weights, [], torch.bfloat16, "nf4")[:-1]
    (dx,) = torch.autograd.grad([y.sum() for y in ys], [x])
    assert dx.shape == x.shape and dx.abs().sum() > 0
    ys = run(kernel, x.detach(), a, b, weights, [], torch.bfloat16, "nf4")[:-1]
    assert len(torch.autograd.grad([y.sum() for y in ys], [*a, *b])) == 4
