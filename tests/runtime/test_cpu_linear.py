"""The generated C++ products of a few rows with 4-bit weights, against fp64 sums over the dequantized weight.

`linear_4bit_small` multiplies in bf16, `wide_linear_4bit_small` in fp32 by one of several instruction sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu
from qlora_compile.runtime.kernels.cpu_linear import Adapter

pytestmark = pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler")
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Kernel(NamedTuple):
    """A kernel, and the instruction set that it is held to ("" for the one that it has)."""

    name: str
    isa: str

    def __call__(self, *arguments: Any, **more: Any) -> None:
        found = kernels.find(self.name, "cpu")
        if found is None or (self.isa and self.isa not in cpu.supported_isas()):
            pytest.skip(f"this machine cannot run {self.name} {self.isa}")
        found(*arguments, **more, **({"isa": self.isa} if self.isa else {}))

    @property
    def wide(self) -> bool:
        return bool(self.isa)

    def error(self) -> float:
        """Relative to a product's magnitudes. bf16: the code book is rounded, at most 2^-9, and fp32 sums of K terms add
        less than 2^-12; fp32: those sums alone, whose weights are what dequantizing to fp32 gives."""
        return 2**-16 if self.wide else 2**-9 + 2**-12


every_kernel = pytest.mark.parametrize(
    "kernel",
    [Kernel("linear_4bit_small", ""), *(Kernel("wide_linear_4bit_small", i) for i in ("avx512", "avx2", "portable"))],
    ids=lambda k: "-".join(k),
)


def run(
    kernel: Callable[..., None], x: Tensor, data: Any, shape: tuple[int, int], quant_type: str, block_size: int, out: Tensor
) -> Tensor:  # fmt: skip
    kernel(x, *data, *shape, quant_type, block_size, out)
    return out


def check(
    kernel: Kernel, x: Tensor, y: Tensor, data: Any, shape: tuple[int, int], quant_type: str, block_size: int
) -> None:
    dense = nf4.dequantize_reference(*data, shape, quant_type, block_size, torch.float32).double()
    expected, magnitudes = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    # the result is rounded once, relative to itself; fp16's numbers below 2^-14 are 2^-24 apart
    tolerance = magnitudes * kernel.error() + expected.abs() * HALF_UNIT[y.dtype] + 2**-25
    assert ((y.double() - expected).abs() <= tolerance).all()


@every_kernel
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 35),
    n=st.integers(1, 37),
    blocks=st.integers(1, 9),
    block_size=st.sampled_from([32, 64, 128, 512]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    seed=st.integers(0, 999),
)
def test_product_equals_the_dense_one(
    kernel: Kernel, m: int, n: int, blocks: int, block_size: int, quant_type: str, double_quant: bool,
    dtypes: tuple[torch.dtype, torch.dtype], seed: int,
) -> None:  # fmt: skip
    x_dtype, out_dtype = dtypes if kernel.wide else (torch.bfloat16, dtypes[1])
    if not kernel.wide and out_dtype == torch.float16:
        out_dtype = torch.float32
    gen = torch.Generator().manual_seed(seed)
    k = blocks * block_size
    data = nf4.quantize_reference(torch.randn(n, k, generator=gen), quant_type, block_size, double_quant)
    x = torch.randn(m, k, generator=gen).to(x_dtype)
    out = torch.full((m * n + 3,), 7.0, dtype=out_dtype)
    y = run(kernel, x, data, (n, k), quant_type, block_size, out)[: m * n].view(m, n)
    check(kernel, x, y, data, (n, k), quant_type, block_size)
    assert (out[m * n :] == 7.0).all(), "wrote past the end"


@every_kernel
def test_each_weight_meets_its_own_column(kernel: Kernel) -> None:
    """Unit rows of x pick single columns of W: an exact check of the nibble order and of each block's scale."""
    n, k = 5, 192
    data = nf4.quantize_reference(torch.randn(n, k) * torch.logspace(-3, 3, n * k).view(n, k), "nf4", 32, False)
    y = run(kernel, torch.eye(k).bfloat16(), data, (n, k), "nf4", 32, torch.empty(k, n))
    codes = torch.stack([data.codes >> 4, data.codes & 15], dim=1).view(-1)
    book = nf4.code_book("nf4") if kernel.wide else nf4.code_book("nf4").bfloat16().float()
    expected = book[codes.int()].view(-1, 32) * data.absmax[:, None]
    assert torch.equal(y, expected.view(n, k).t())


@every_kernel
def test_rows_of_x_may_be_strided_and_absent(kernel: Kernel) -> None:
    data = nf4.quantize_reference(torch.randn(7, 320), "fp4", 64, True)
    wide = torch.randn(3, 500).bfloat16()
    x = wide[:, 9:329]
    assert not x.is_contiguous()
    y = run(kernel, x, data, (7, 320), "fp4", 64, torch.empty(3, 7))
    assert torch.equal(y, run(kernel, x.contiguous(), data, (7, 320), "fp4", 64, torch.empty(3, 7)))
    assert run(kernel, x[:0], data, (7, 320), "fp4", 64, torch.empty(0, 7)).shape == (0, 7)


@every_kernel
@pytest.mark.parametrize("m", [3, 20])
def test_thread_count_changes_nothing(kernel: Kernel, m: int) -> None:
    adapter = Adapter(torch.randn(100, 448), torch.randn(301, 100))
    data = nf4.quantize_reference(torch.randn(301, 448), "nf4", 64, True)
    x = torch.randn(m, 448).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.empty(m, 301))
            kernel(x, *data, 301, 448, "nf4", 64, results[-1], adapters=[adapter])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_kernel
def test_bad_arguments_never_reach_c(kernel: Kernel) -> None:
    data = nf4.quantize_reference(torch.randn(7, 96), "nf4", 64, True)
    x, out = torch.randn(3, 96).bfloat16(), torch.empty(3, 7)
    with pytest.raises(KernelError, match="needs whole blocks in each row: 96 is no multiple of 64"):
        run(kernel, x, data, (7, 96), "nf4", 64, out)
    data = nf4.quantize_reference(torch.randn(7, 128), "nf4", 64, True)
    with pytest.raises(KernelError, match=r"x must be a .*bfloat16.* \[M, 128\] CPU tensor"):
        run(kernel, x, data, (7, 128), "nf4", 64, out)
    x = torch.randn(3, 128).bfloat16()
    with pytest.raises(KernelError, match=r"x must be a .*, got torch.float64"):
        run(kernel, x.double(), data, (7, 128), "nf4", 64, out)
    with pytest.raises(KernelError, match="codes holds 448 elements, the weight needs 512"):
        run(kernel, x, data, (8, 128), "nf4", 64, out)
    with pytest.raises(KernelError, match="out holds 20 elements, the product needs 21"):
        run(kernel, x, data, (7, 128), "nf4", 64, out.view(-1)[:20])


@every_kernel
@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 35),
    n=st.integers(1, 37),
    blocks=st.integers(1, 6),
    ranks=st.lists(st.integers(1, 35), min_size=1, max_size=3),
    a_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    b_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_adapters_and_bias_join_the_sum_before_its_one_rounding(
    kernel: Kernel, m: int, n: int, blocks: int, ranks: list[int], a_dtype: torch.dtype, b_dtype: torch.dtype, bias: bool,
    seed: int,
) -> None:  # fmt: skip
    gen = torch.Generator().manual_seed(seed)
    k = blocks * 64
    data = nf4.quantize_reference(torch.randn(n, k, generator=gen), "nf4", 64, True)
    x = torch.randn(m, k, generator=gen).bfloat16()
    adapters = [
        Adapter(
            (torch.randn(r, k, generator=gen) / 8).to(a_dtype),
            torch.randn(n, r, generator=gen).to(b_dtype),
            alpha=0.5 + j,
            scaling=torch.tensor(1.5) if j else None,
        )
        for j, r in enumerate(ranks)
    ]
    b = torch.randn(n, generator=gen).bfloat16() if bias else None
    y, h = torch.empty(m, n), torch.empty(m, sum(ranks), dtype=torch.bfloat16)
    kernel(x, *data, n, k, "nf4", 64, y, b, adapters, h)
    # the base product's own error is tested above: here it is what the same kernel gives without adapters
    base = run(kernel, x, data, (n, k), "nf4", 64, torch.empty(m, n)).double()
    dense = nf4.dequantize_reference(*data, (n, k), "nf4", 64, torch.float32).double()
    magnitudes = x.double().abs() @ dense.abs().t()  # the order of its fp32 sum may be another
    expected, lows = base.clone() if b is None else base + b.double(), []
    for a, up, alpha, scaling in adapters:
        rounded, scale = (
            (a if kernel.wide else a.bfloat16()).double(),
            alpha * (1.0 if scaling is None else scaling.item()),
        )
        lows.append(x.double() @ rounded.t())
        expected += scale * lows[-1] @ up.double().t()
        magnitudes = magnitudes + scale * (x.double().abs() @ rounded.abs().t()) @ up.double().abs().t()
    assert ((y.double() - expected).abs() <= magnitudes * 2**-18 + 1e-30).all()
    low = torch.cat(lows, 1)
    assert ((h.double() - low).abs() <= low.abs() * 2**-8 + 1e-4).all()
    rounded_y = torch.empty(m, n, dtype=torch.bfloat16)
    kernel(x, *data, n, k, "nf4", 64, rounded_y, b, adapters)
    assert torch.equal(rounded_y, y.bfloat16()), "a second rounding"


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_backward_keeps_has_the_input_s_dtype(isa: str, dtype: torch.dtype) -> None:
    kernel = Kernel("wide_linear_4bit_small", isa)
    data = nf4.quantize_reference(torch.randn(9, 192), "nf4", 64, True)
    x, adapters = torch.randn(3, 192).to(dtype), [Adapter(torch.randn(r, 192), torch.randn(9, r)) for r in (3, 17)]
    y, h = torch.empty(3, 9, dtype=dtype), torch.full((3, 22), 7.0, dtype=dtype)
    kernel(x, *data, 9, 192, "nf4", 64, y, adapters=adapters, h=h)
    for got, adapter in zip(h[:, :20].split([3, 17], dim=1), adapters):
        low, magnitudes = x.double() @ adapter.a.double().t(), x.double().abs() @ adapter.a.double().abs().t()
        assert ((got.double() - low).abs() <= low.abs() * HALF_UNIT[dtype] + magnitudes * 2**-18 + 2**-25).all()
    assert (h[:, 20:] == 7).all()


@every_kernel
def test_adapters_that_do_not_fit_never_reach_c(kernel: Kernel) -> None:
    data = nf4.quantize_reference(torch.randn(7, 128), "nf4", 64, True)
    x, out = torch.randn(3, 128).bfloat16(), torch.empty(3, 7)
    a, b = torch.randn(4, 128), torch.randn(7, 4)
    with pytest.raises(KernelError, match=r"A \[4, 128\] and B \[8, 4\] are no adapter of a weight \[7, 128\]"):
        kernel(x, *data, 7, 128, "nf4", 64, out, adapters=[Adapter(a, torch.randn(8, 4))])
    with pytest.raises(
        KernelError, match="lora_a must be a contiguous float32 or bfloat16 tensor on cpu, got a contiguous"
    ):
        kernel(x, *data, 7, 128, "nf4", 64, out, adapters=[Adapter(a.half(), b)])
    with pytest.raises(KernelError, match=r"h must have x's dtype torch.bfloat16, got torch.float32"):
        kernel(x, *data, 7, 128, "nf4", 64, out, adapters=[Adapter(a, b)], h=torch.empty(3, 4))
    with pytest.raises(KernelError, match="bias holds 6 elements, the weight needs 7"):
        kernel(x, *data, 7, 128, "nf4", 64, out, torch.randn(6))
