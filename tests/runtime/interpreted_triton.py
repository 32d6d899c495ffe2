"""The numbers of the Triton kernels, under Triton's interpreter: run by test_triton_interpreted.py in a process of its own.

Outputs are compared in fp32, where a sum's order is all that may differ; bf16 outputs within one unit in the last place,
since the interpreter truncates where hardware rounds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qlora_compile as qc
from qlora_compile import nf4
from qlora_compile.errors import KernelError, NonFiniteError
from qlora_compile.runtime import paged_backward, paged_optimizer_sweep
from qlora_compile.runtime.kernels import (
    triton_codec,
    triton_cross_entropy,
    triton_linear,
    triton_low_rank,
    triton_paged_step,
    triton_vector,
)
from qlora_compile.runtime.kernels.paged_step_proof import proves_paged_step
from qlora_compile.runtime.kernels.triton_operands import Adapter, VectorAdapter, Weight

GENERATOR = torch.Generator().manual_seed(23)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def _weight(n: int, k: int, quant_type: str = "nf4", block_size: int = 32, double_quant: bool = True) -> Weight:
    data = nf4.quantize_reference(_randn(n, k), quant_type, block_size, double_quant)
    return Weight(data, n, k, quant_type, block_size)


def _dense(weight: Weight) -> Tensor:
    shape = (weight.rows, weight.columns)
    return nf4.dequantize_reference(*weight.data, shape, weight.quant_type, weight.block_size, torch.float32)


def _adapter(m: int, n: int, rank: int) -> Adapter:
    return Adapter(_randn(m, rank), _randn(n, rank), 1.5, torch.tensor(0.5))


def _low_rank(adapters: list[Adapter]) -> Tensor:
    return sum((0.75 * a.low.double() @ a.factor.double().t() for a in adapters), torch.zeros(()).double())


def _close(got: Tensor, expected: Tensor, terms: int) -> None:
    """fp32 sums of `terms` products of size about 1, in another order than fp64's."""
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-7 * terms)


def test_dequantize_into_rows_that_lie_apart() -> None:
    data = nf4.quantize_reference(_randn(7, 96), "nf4", 32, True)
    wide = torch.full((7, 112), 7.0)
    triton_codec.dequantize_4bit(*data, 7 * 96, "nf4", 32, wide[:, :96])
    assert torch.equal(wide[:, :96], nf4.dequantize_reference(*data, (7, 96), "nf4", 32, torch.float32))
    assert (wide[:, 96:] == 7.0).all()
    with pytest.raises(KernelError, match="a row of out holds 96 elements, the weight needs 112"):
        triton_codec.dequantize_4bit(*data, 7 * 96, "nf4", 32, wide[:6, :96])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant", "shape"),
    [
        ("nf4", 64, True, (7, 33)),
        ("fp4", 32, False, (5, 13)),
        ("nf4", 128, True, (1, 1)),
        ("fp4", 4096, True, (3, 1501)),
    ],
)
def test_dequantize(
    quant_type: str, block_size: int, double_quant: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    data = nf4.quantize_reference(_randn(*shape), quant_type, block_size, double_quant)
    expected = nf4.dequantize_reference(*data, shape, quant_type, block_size, torch.float32)
    out = torch.full(shape, torch.nan, dtype=dtype)
    triton_codec.dequantize_4bit(*data, out.numel(), quant_type, block_size, out)
    if dtype == torch.float32:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    ("quant_type", "block_size", "shape"),
    [("nf4", 64, (7, 33)), ("fp4", 32, (5, 13)), ("nf4", 256, (9, 57)), ("fp4", 64, (1, 1))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_has_the_bytes_of_the_reference(
    quant_type: str, block_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    dense = _randn(*shape)
    dense[0, : shape[1] // 2] = 0  # a block of zeros, or part of one
    dense = dense.to(dtype)
    got = triton_codec.quantize_4bit(dense, quant_type, block_size, False)
    expected = nf4.quantize_reference(dense, quant_type, block_size, False)
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.absmax, expected.absmax)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_few_rows_of_a_group(m: int, double_quant: bool) -> None:
    weights = [_weight(n, 96, double_quant=double_quant) for n in (21, 10, 7)]
    x, h, ranks = _randn(m, 96), torch.full((m, 79), torch.nan), ((70,), (3, 2), (4,))
    adapters = [
        [VectorAdapter(_randn(96, r).t(), _randn(w.rows, r), 1.5, torch.tensor(0.5)) for r in mine]
        for w, mine in zip(weights, ranks)
    ]
    bias = [_randn(w.rows) for w in weights]
    outs = [torch.full((m, w.rows), torch.nan) for w in weights]
    triton_vector.lora_linear_vector(x, weights, outs, h, adapters, bias)
    lows = iter(h.split([70, 3, 2, 4], dim=1))
    for weight, out, mine, b in zip(weights, outs, adapters, bias):
        low = [Adapter(next(lows), adapter.up, 1.5, adapter.scaling) for adapter in mine]
        for one, adapter in zip(low, mine):
            _close(one.low, x.double() @ adapter.down.double().t(), 96)
        _close(out, x.double() @ _dense(weight).double().t() + _low_rank(low) + b.double(), 110)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_rows_longer_than_a_step_whose_codes_begin_anywhere(dtype: torch.dtype, block_size: int) -> None:
    """Two steps over K, more weight rows than a program takes, and codes that are a slice from an odd address."""
    m, n, k = 2, 261, 1056
    weight = _weight(n, k, "fp4", block_size)
    buffer = torch.zeros(weight.data.codes.numel() + 5, dtype=torch.uint8)
    assert buffer.data_ptr() % 4 == 0
    codes = buffer[5:]
    codes.copy_(weight.data.codes)
    x, out = _randn(m, k).to(dtype), torch.empty(m, n)
    sliced = Weight(weight.data._replace(codes=codes), n, k, "fp4", block_size)
    triton_vector.lora_linear_vector(x, [sliced], [out], _randn(m, 0).to(dtype))
    _close(out, x.double() @ _dense(weight).double().t(), k)
    if dtype == torch.float32:
        gemm, dx = torch.empty(m, n), torch.empty(m, k)
        triton_linear.lora_linear_gemm(x, sliced, gemm)
        _close(gemm, x.double() @ _dense(weight).double().t(), k)
        triton_linear.lora_linear_dx(dx, [out], [sliced])
        # dy is y here, of size 30: a sum of n terms of it
        _close(dx / 30, out.double() @ _dense(weight).double() / 30, n)


@pytest.mark.parametrize(("m", "n", "k"), [(5, 37, 96), (17, 70, 160), (70, 33, 64)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gemm_with_adapters_and_bias(m: int, n: int, k: int, quant_type: str) -> None:
    weight, x, bias = _weight(n, k, quant_type), _randn(m, k + 3)[:, :k], _randn(n)
    adapters = [_adapter(m, n, 5), _adapter(m, n, 18)]
    out = torch.full((m, n), torch.nan)
    triton_linear.lora_linear_gemm(x, weight, out, adapters, bias)
    _close(out, x.double() @ _dense(weight).double().t() + _low_rank(adapters) + bias.double(), k + 23)


@pytest.mark.parametrize("m", [5, 70])
def test_dx_of_a_group_is_one_sum(m: int) -> None:
    weights, dys = [_weight(33, 96), _weight(20, 96)], [_randn(m, 33), _randn(m, 20)]
    adapters = [Adapter(_randn(m, 5), _randn(5, 96)), Adapter(_randn(m, 3), _randn(3, 96))]
    dx = torch.full((m, 96), torch.nan)
    triton_linear.lora_linear_dx(dx, dys, weights, adapters)
    expected = sum(dy.double() @ _dense(w).double() for dy, w in zip(dys, weights))
    expected = expected + sum(a.low.double() @ a.factor.double() for a in adapters)
    _close(dx, expected, 61)


def test_low_rank_products_and_their_gradients() -> None:
    m, k, n = 37, 70, 45
    x, factors = _randn(m, k), [_randn(5, k), _randn(18, k)]
    h = torch.full((m, 23), torch.nan)
    triton_low_rank.lora_down(x, factors, h)
    _close(h, x.double() @ torch.cat(factors).double().t(), k)
    y, ups, bias = _randn(m, n), [_randn(n, 5), _randn(n, 18)], _randn(n)
    parts = list(h.split([5, 18], dim=1))
    scale = triton_low_rank.Scale([2.0, 0.5], [torch.tensor(0.25), torch.tensor(3.0)])
    expected = y.double() + bias.double() + 0.5 * parts[0].double() @ ups[0].double().t()
    expected = expected + 1.5 * parts[1].double() @ ups[1].double().t()
    triton_low_rank.lora_up(y, parts, ups, scale, bias=bias)
    # h itself has values up to about 30
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)
    outs = [torch.full((5, k), torch.nan), torch.full((18, k), torch.nan)]
    triton_low_rank.lora_over_tokens(parts, x, outs)
    for part, out in zip(parts, outs):
        torch.testing.assert_close(out.double(), part.double().t() @ x.double(), rtol=1e-5, atol=1e-3)


def test_split_sums_of_a_transposed_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """dB lies [C, R] in memory: its parts are summed there, by the kernel, to the same bits."""
    m, r, c = 700, 5, 33
    left, right = _randn(m, r), _randn(m, c)
    sums, made = list[tuple[int, int]](), triton_low_rank._sum_launch

    def sum_launch(splits: int, numel: int) -> Any:
        sums.append((splits, numel))
        return made(splits, numel)

    monkeypatch.setattr(triton_low_rank, "_sum_launch", sum_launch)
    straight, turned, loose = torch.empty(r, c), torch.empty(c, r).t(), torch.empty(2 * c, 2 * r)[::2, ::2].t()
    for out in (straight, turned, loose):
        out.fill_(torch.nan)
        triton_low_rank.lora_over_tokens([left], right, [out])
    torch.testing.assert_close(straight.double(), left.double().t() @ right.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(turned, straight)
    # added by torch, in an order of its own
    torch.testing.assert_close(loose, straight, rtol=1e-5, atol=1e-4)
    assert len(sums) == 2 and sums[0][0] > 1


def test_dropout_is_drawn_again_from_its_seed() -> None:
    """Forward and backward see one mask: the gradient of sum(h) with respect to x is the mask times A's column sums."""
    m, k, r = 33, 64, 4
    x, a = torch.ones(m, k), torch.ones(r, k)
    dropout = triton_low_rank.Dropout([torch.tensor(99)], 0.75)
    h, again, other = (torch.full((m, r), torch.nan) for _ in range(3))
    triton_low_rank.lora_down(x, [a], h, dropout=dropout)
    triton_low_rank.lora_down(x, [a], again, dropout=dropout)
    triton_low_rank.lora_down(x, [a], other, dropout=triton_low_rank.Dropout([torch.tensor(100)], 0.75))
    assert torch.equal(h, again) and not torch.equal(h, other)
    kept = h[:, 0] * 0.75  # how many of a row's 64 elements stayed
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-4)
    assert 0.65 < kept.sum().item() / (m * k) < 0.85  # 0.75 of 2112 draws: four standard deviations are 0.04
    da = [torch.full((r, k), torch.nan)]
    triton_low_rank.lora_over_tokens([torch.ones(m, r)], x, da, dropout=dropout)
    torch.testing.assert_close(da[0].sum(1), h.sum(0), rtol=1e-5, atol=1e-3)  # both count what stayed, over 0.75


def test_nothing_to_do() -> None:
    weight = _weight(21, 96)
    triton_linear.lora_linear_gemm(_randn(0, 96), weight, torch.empty(0, 21))
    out = torch.full((3, 5), torch.nan)
    triton_low_rank.lora_over_tokens([_randn(0, 3)], _randn(0, 5), [out])
    assert torch.equal(out, torch.zeros(3, 5))


@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, 0.0), (-0.5, 0.0), (0.5, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "v"), [(1, 1), (3, 31), (2, 5003), (0, 9)])
def test_cross_entropy(m: int, v: int, dtype: torch.dtype, scale: float, soft_cap: float) -> None:
    """Losses and gradients, in place and of some rows elsewhere."""
    z, target = (_randn(m, v) * 5).to(dtype), torch.randint(0, v, (m,), generator=GENERATOR)
    wide = z.double().requires_grad_()
    y = soft_cap * torch.tanh(scale * wide / soft_cap) if soft_cap else scale * wide
    expected = torch.nn.functional.cross_entropy(y, target, reduction="none")
    grad = torch.autograd.grad(expected.sum(), wide)[0] if m else wide.detach()
    losses, rows = torch.empty(m), torch.arange(m).flip(0)
    out = torch.full((m, v + 3), 7.0, dtype=dtype)
    triton_cross_entropy.cross_entropy(z, target.flip(0), losses, out[:, :v], rows, scale, soft_cap)
    # fp32 sums of up to 5003 exponentials; a gradient is rounded once (the interpreter truncates to bf16)
    torch.testing.assert_close(losses.flip(0).double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert ((out[:, :v].flip(0).double() - grad).abs() <= grad.abs() * rounding + 1e-6).all()
    assert (out[:, v:] == 7.0).all()
    again = torch.empty(m)
    triton_cross_entropy.cross_entropy(z, target, again, None, None, scale, soft_cap)
    assert torch.equal(again, losses.flip(0))
    triton_cross_entropy.cross_entropy(z, target, again, z, None, scale, soft_cap)
    assert torch.equal(z.flip(0), out[:, :v])


def test_cross_entropy_of_extremes_and_of_no_class() -> None:
    z = torch.zeros(5, 40)
    z[0, 3:] = -torch.inf
    z[1] = -1e38
    z[1, 39] = 1e38
    z[2, 17] = torch.nan
    losses = torch.empty(5)
    triton_cross_entropy.cross_entropy(z, torch.tensor([1, 39, 5, 8, 40]), losses, z)
    assert losses[0].item() == pytest.approx(torch.tensor(3.0).log().item()) and losses[1] == 0
    assert (z[0, 3:] == 0).all() and (z[1] == 0).all() and losses[2].isnan() and z[3].isfinite().all()
    assert losses[4].isnan()
    with pytest.raises(KernelError, match=r"target must be a int64 \[5\] tensor on cpu with contiguous rows, got"):
        triton_cross_entropy.cross_entropy(z, torch.zeros(4, dtype=torch.int64), losses)


def test_paged_step() -> None:
    cpu = torch.device("cpu")
    assert proves_paged_step(triton_paged_step.paged_step, cpu)
    assert not proves_paged_step(lambda *_: None, cpu)

    def without_decay(pieces: Tensor, numbers: Tensor, *rest: Any) -> None:
        triton_paged_step.paged_step(pieces, numbers.clone().index_fill_(1, torch.tensor([0]), 1.0), *rest)

    assert not proves_paged_step(without_decay, cpu)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_sweep_over_several_pages(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    start = [_randn(61, 97), _randn(5), _randn(3, 33).bfloat16()]
    gradients = [torch.randn_like(value) for value in start]
    trained = []
    for kernel in (None, triton_paged_step.paged_step):
        monkeypatch.setattr(paged_optimizer_sweep.kernels, "find", lambda op, device, kernel=kernel: kernel)
        monkeypatch.setattr(paged_optimizer_sweep, "defers", lambda pool: True)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = qc.PagedAdamW(parameters, lr=0.01, state_bits=bits, device_budget="32KiB")
        for _ in range(2):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient.clone()
            optimizer.step()
        trained.append(parameters)
    for reference, ours in zip(*trained):
        torch.testing.assert_close(ours, reference, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    start, gradients = [_randn(61, 97), _randn(67, 70)], [_randn(61, 97), _randn(67, 70)]
    trained = []
    for kernel in (None, triton_paged_step.paged_step):
        monkeypatch.setattr(paged_optimizer_sweep.kernels, "find", lambda op, device, kernel=kernel: kernel)
        for module in (paged_optimizer_sweep, paged_backward):
            monkeypatch.setattr(module, "defers", lambda pool, kernel=kernel: kernel is not None)
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = qc.PagedAdamW(parameters, lr=0.01, state_bits=bits, step_in_backward=True)
        (parameters[0] * gradients[0] * torch.inf).sum().backward()
        (parameters[1] * gradients[1]).sum().backward()
        with pytest.raises(NonFiniteError, match="number 0 among them"):
            optimizer.step()
        assert torch.equal(parameters[0], start[0]) and not torch.equal(parameters[1], start[1])
        sum((p * g).sum() for p, g in zip(parameters, gradients)).backward()  # type: ignore[union-attr]
        optimizer.step()
        trained.append(parameters)
    for reference, ours in zip(*trained):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
