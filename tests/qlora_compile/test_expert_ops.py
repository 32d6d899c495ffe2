"""The ops of a mixture of experts against plain fp64, and what torch asks of an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_compile as qc
from qlora_compile import expert_ops, expert_products  # noqa: F401  defines the ops
from qlora_compile.runtime.kernels import cpu_gemm

E, N, K, R = 5, 21, 37, 3
ROWS = (4, 0, 1, 9, 0)  # experts without tokens, one with a single one
OP = torch.ops.qlora.grouped_lora_linear


def _arguments(
    *, quant_type: str, transposed: bool, dtype: torch.dtype, adapters: int = 1, tail: int = 0, double: bool = True
) -> dict[str, Any]:
    x = torch.randn(sum(ROWS) + tail, K, dtype=dtype).requires_grad_()
    weight = torch.randn(E, K, N) if transposed else torch.randn(E, N, K)
    scales: list[Tensor] = []
    if quant_type != "none":
        quantized = qc.quantize_4bit(weight, quant_type=quant_type, block_size=32, double_quant=double, per_expert=True)
        weight, scales = quantized.codes, quantized.scales
    return {
        "x": x,
        "offsets": torch.tensor(ROWS).cumsum(0).to(torch.int32),
        "weight": weight,
        "scales": scales,
        "lora_a": [torch.randn(E, R + j, K).requires_grad_() for j in range(adapters)],
        "lora_b": [torch.randn(E, N, R + j).requires_grad_() for j in range(adapters)],
        "scaling": [torch.tensor(0.7 + j) for j in range(adapters)],
        "alpha": [1.5 - 2 * j for j in range(adapters)],
        "out_features": N,
        "transposed": transposed,
        "quant_type": quant_type,
        "block_size": 32,
        "dtype": dtype,
    }


def _dense(given: dict[str, Any]) -> Tensor:
    shape = (E, K, N) if given["transposed"] else (E, N, K)
    if given["quant_type"] == "none":
        return given["weight"].double()
    dense = torch.ops.qlora.dequantize_experts(
        given["weight"], given["scales"], shape, given["quant_type"], 32, torch.float32
    )
    return dense.double()


def _reference(given: dict[str, Any], x: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """y in fp64, every expert's matrix made whole."""
    weight = _dense(given)
    weight = weight.mT if given["transposed"] else weight
    for a_j, b_j, alpha, scaling in zip(a, b, given["alpha"], given["scaling"]):
        weight = weight + alpha * scaling.double() * (b_j @ a_j)
    out, start = x.new_zeros(x.shape[0], N), 0
    parts = []
    for expert, count in enumerate(ROWS):
        parts.append(x[start : start + count] @ weight[expert].t())
        start += count
    return torch.cat([*parts, out[start:]])


# fp32: sums of at most 40 products; bf16: 8 bits of mantissa in x, W, A, B and in h = x Aᵀ, |y| up to about 60
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.6, 0.03)}


@pytest.mark.parametrize(
    ("kernel", "sizes"), [("library_gemm", (N, K)), ("fused_fp32", (N, K)), ("fused_fp32", (64, 96))]
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("fp4", False), ("none", True)])
def test_numbers_and_gradients_are_those_of_fp64(
    quant_type: str, double: bool, transposed: bool, dtype: torch.dtype, kernel: str, sizes: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The generated GEMM reads codes where rows are whole blocks (64, 96), else what was decoded."""
    if kernel == "fused_fp32" and cpu_gemm.declines():
        pytest.skip("wide_gemm cannot run here")
    monkeypatch.setitem(globals(), "N", sizes[0])
    monkeypatch.setitem(globals(), "K", sizes[1])
    given = _arguments(quant_type=quant_type, transposed=transposed, dtype=dtype, adapters=2, tail=2, double=double)
    atol, rtol = TOLERANCES[dtype]
    wide = [t.detach().double().requires_grad_() for t in (given["x"], *given["lora_a"], *given["lora_b"])]
    want = _reference(given, wide[0], wide[1:3], wide[3:])
    y, h = OP(*given.values(), kernel, kernel)
    assert h.shape == (given["x"].shape[0], 2 * R + 1)
    torch.testing.assert_close(y.double(), want, atol=atol, rtol=rtol)
    assert not y[sum(ROWS) :].any()
    dy = torch.randn_like(y)
    dy[sum(ROWS) :] = 0
    y.backward(dy)
    want.backward(dy.double())
    for got, expected in zip((given["x"], *given["lora_a"], *given["lora_b"]), wide, strict=True):
        assert got.grad is not None and got.grad.dtype == got.dtype
        scale = expected.grad.abs().max().item()  # type: ignore[union-attr]
        torch.testing.assert_close(got.grad.double(), expected.grad, atol=atol * max(1, scale / 60), rtol=rtol)
    for expert, count in enumerate(ROWS):
        if not count:
            assert not given["lora_a"][0].grad[expert].any()
            assert not given["lora_b"][1].grad[expert].any()


@pytest.mark.parametrize("adapters", [0, 1, 2])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_opcheck(quant_type: str, adapters: int) -> None:
    given = _arguments(quant_type=quant_type, transposed=False, dtype=torch.float32, adapters=adapters)
    torch.library.opcheck(OP.default, tuple(given.values()))


def test_opcheck_of_the_others() -> None:
    given = _arguments(quant_type="nf4", transposed=True, dtype=torch.float32)
    y, h = OP(*given.values())
    values = list({**given, "x": given["x"].detach()}.values())
    del values[8]
    factors = [[t.detach() for t in values[i]] for i in (4, 5)]
    values[4:6] = factors
    backward = torch.ops.qlora.grouped_lora_linear_backward.default
    rest = (torch.randn_like(y), values[0], h.detach(), *values[1:])
    torch.library.opcheck(backward, (*rest, True, True))
    torch.library.opcheck(backward, (*rest, True, False))
    args = (given["weight"], given["scales"], [E, K, N], "nf4", 32, torch.bfloat16)
    torch.library.opcheck(torch.ops.qlora.dequantize_experts.default, args)


def test_no_rows_at_all() -> None:
    given = _arguments(quant_type="nf4", transposed=False, dtype=torch.bfloat16)
    given["x"], given["offsets"] = torch.zeros(0, K, dtype=torch.bfloat16), torch.zeros(E, dtype=torch.int32)
    y, h = OP(*given.values())
    assert y.shape == (0, N) and h.shape == (0, R)


@pytest.mark.parametrize("double", [True, False])
def test_each_expert_has_the_bytes_that_it_has_alone(double: bool) -> None:
    weight = torch.randn(3, 13, 11, dtype=torch.bfloat16)  # odd: 143 weights, 5 blocks of 32, half a byte over
    together = qc.quantize_4bit(weight, block_size=32, double_quant=double, per_expert=True)
    for expert, matrix in enumerate(weight):
        alone = qc.quantize_4bit(matrix, block_size=32, double_quant=double)
        for part, own in zip([together.codes, *together.scales], [alone.codes, *alone.scales], strict=True):
            assert torch.equal(part[expert], own)
        assert torch.equal(together.dequantize()[expert], alone.dequantize())


@pytest.mark.skipif(cpu_gemm.declines() is not None, reason="wide_gemm cannot run here")
def test_a_factor_for_each_row_by_both_kernels() -> None:
    """Where rows of a batch choose an adapter each."""
    results = []
    for kernel in ("library_gemm", "fused_fp32"):
        torch.manual_seed(0)
        given = _arguments(quant_type="none", transposed=False, dtype=torch.float32, adapters=2)
        given["scaling"][0] = torch.rand(sum(ROWS))
        y, h = OP(*given.values(), kernel, kernel)
        y.square().sum().backward()
        results.append([y, h, *(t.grad for t in (given["x"], *given["lora_a"], *given["lora_b"]))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max()))


def test_only_experts_with_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_compile import expert_products

    seen: list[int] = []
    whole = expert_products.ExpertGroup.dense
    monkeypatch.setattr(expert_products.ExpertGroup, "dense", lambda self, e: seen.append(e) or whole(self, e))
    given = _arguments(quant_type="nf4", transposed=False, dtype=torch.float32)
    OP(*given.values())[0].sum().backward()
    assert seen == [0, 2, 3, 0, 2, 3]


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_with_adapters_are_rounded_once(transposed: bool, adapters: int) -> None:
    """y and dx in bf16 are no further from fp64 than the exact results in bf16 are (a second rounding: 1.4 times)."""
    given = _arguments(quant_type="nf4", transposed=transposed, dtype=torch.bfloat16, adapters=adapters)
    for factor in given["lora_b"]:
        factor.detach().mul_(2**-8)
    decoded = torch.ops.qlora.dequantize_experts(
        given["weight"], given["scales"], (E, K, N) if transposed else (E, N, K), "nf4", 32, torch.bfloat16
    )
    exact = given | {"weight": decoded, "quant_type": "none"}  # the weights that the products read
    x = given["x"].detach().double().requires_grad_()
    want = _reference(exact, x, *([t.detach().double() for t in given[name]] for name in ("lora_a", "lora_b")))
    y, _ = OP(*given.values())
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy.double())
    for got, wide in ((y, want), (given["x"].grad, x.grad)):
        assert got is not None and wide is not None
        rounding = (wide.bfloat16().double() - wide).square().mean().sqrt()
        assert (got.double() - wide).square().mean().sqrt() < 1.1 * rounding


def test_an_adapters_weight_may_be_a_number_on_the_device() -> None:
    """Where reading it would wait for the device it stays a tensor, which no row is taken of."""
    low, rows = torch.randn(3, R), slice(2, 5)
    factors = [1.5, torch.tensor(1.5), torch.full((6, 1), 1.5)]
    assert all(torch.equal(expert_products.scaled(low, factor, rows), low * 1.5) for factor in factors)
    assert expert_products._read(torch.tensor(2.0), torch.bfloat16) == 2.0
    assert expert_products._read(torch.empty((), device="meta"), torch.bfloat16).dtype == torch.float32  # type: ignore[union-attr]
