"""The generated fp32 GEMM over dense and 4-bit matrices, against fp64. `lora_linear` by it: `test_fp32_linear.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.errors import KernelError
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpu_gemm, devices
from qlora_compile.runtime.kernels.cpu_gemm import Codes, Term, wide_gemm

pytestmark = pytest.mark.skipif(cpu_gemm.declines() is not None, reason="wide_gemm cannot run here")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_AVX512 = devices.kind("cpu") in ("cpu-amx", "cpu-avx512_bf16", "cpu-avx512")
each_isa = pytest.mark.parametrize(
    "isa",
    [pytest.param("avx512", marks=pytest.mark.skipif(not HAS_AVX512, reason="this machine has no AVX-512")), "avx2"],
)
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def codes(
    rows: int, columns: int, quant_type: str = "nf4", block_size: int = 64, double: bool = True
) -> tuple[Codes, Tensor]:
    """A random weight in 4 bits, and its fp32 values."""
    data = nf4.quantize_reference(torch.randn(rows, columns), quant_type, block_size, double)
    dense = nf4.dequantize_reference(*data, (rows, columns), quant_type, block_size, torch.float32)
    return Codes(*data, rows, columns, quant_type, block_size), dense


def dense(right: Tensor | Codes) -> Tensor:
    if isinstance(right, Tensor):
        return right
    data = right.codes, right.absmax, right.absmax_scale, right.absmax_offset
    shape = right.rows, right.columns
    full = nf4.dequantize_reference(*data, shape, right.quant_type, right.block_size, torch.float32)
    return full.t() if right.transposed else full


def check(terms: Sequence[Term], out: Tensor, bias: Tensor | None = None, isa: str = "auto") -> None:
    """A rounding of the result, and fp32 sums of K terms relative to their magnitudes."""
    wide_gemm(terms, out, bias, isa)
    expected = torch.zeros(out.shape, dtype=torch.float64) + (0 if bias is None else bias.double())
    magnitudes = expected.abs()
    for left, right, factor in terms:
        a, b = left.double(), dense(right).double()
        expected += factor * (a @ b)
        magnitudes += abs(factor) * (a.abs() @ b.abs())
    # fp16's numbers below 2^-14 are 2^-24 apart
    tolerance = (
        magnitudes * 2**-19 + expected.abs() * HALF_UNIT[out.dtype] + (2**-25 if out.dtype == torch.float16 else 0)
    )
    assert ((out.double() - expected).abs() <= tolerance).all(), float((out.double() - expected).abs().max())


def matrix(rows: int, columns: int, dtype: torch.dtype, by_columns: bool, gap: int = 0) -> Tensor:
    """Contiguous along one dimension, lines `gap` elements further apart than they are long."""
    lines, length = (columns, rows) if by_columns else (rows, columns)
    made = torch.randn(lines, length + gap).to(dtype)[:, :length]
    return made.t() if by_columns else made


@each_isa
@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 90)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    by_columns=st.tuples(*[st.booleans()] * 3),
    gap=st.integers(0, 3),
    bias=st.sampled_from([None, *DTYPES]),
    seed=st.integers(0, 999),
)
def test_dense_matrices(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    by_columns: tuple[bool, bool, bool],
    gap: int,
    bias: torch.dtype | None,
    seed: int,
    isa: str,
) -> None:
    torch.manual_seed(seed)
    m, n, k = sizes
    left, right = matrix(m, k, dtypes[0], by_columns[0], gap), matrix(k, n, dtypes[1], by_columns[1], gap)
    around = torch.full((n + 2, m + 2 + gap) if by_columns[2] else (m + 2, n + 2 + gap), 7.0, dtype=dtypes[2])
    out = around[1:-1, 1 : -1 - gap]
    result = out.t() if by_columns[2] else out
    check([Term(left, right, 0.5)], result, None if bias is None else torch.randn(n).to(bias), isa)
    out.fill_(7.0)
    assert (around == 7.0).all(), "wrote beside the result"


@each_isa
@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    blocks=st.integers(1, 9),
    block_size=st.sampled_from([32, 64, 128, 512]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    rank=st.integers(0, 20),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    seed=st.integers(0, 999),
)
def test_codes_both_ways_with_a_low_rank_term(
    m: int, n: int, blocks: int, block_size: int, quant_type: str, double: bool, rank: int,
    dtypes: tuple[torch.dtype, torch.dtype], seed: int, isa: str,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    k = blocks * block_size
    w, _ = codes(n, k, quant_type, block_size, double)
    x, h, a, b = torch.randn(m, k).to(dtypes[0]), torch.randn(m, rank), torch.randn(rank, k), torch.randn(n, rank)
    check([Term(x, w.t()), Term(h, b.t(), -1.5)], torch.empty(m, n, dtype=dtypes[1]), isa=isa)
    check([Term(x[:, :n], w), Term(h, a)] if n <= k else [Term(h, a)], torch.empty(m, k, dtype=dtypes[1]), isa=isa)


@each_isa
@pytest.mark.parametrize(
    ("m", "n", "k"), [(965, 130, 96), (7, 1056, 160), (50, 40, 1300), (13, 20, 2080), (800, 2016, 672)]
)
def test_more_than_a_block_of_each(m: int, n: int, k: int, isa: str) -> None:
    """Rows, columns and depth beyond what is laid out at a time; and several weights in one sum, of several depths."""
    w, _ = codes(n, k // 32 * 32, block_size=32)
    other, _ = codes(k // 32 * 32, n // 32 * 32, block_size=32)
    x = torch.randn(m, w.columns).bfloat16()
    check([Term(x, w.t(), 2.0), Term(torch.randn(m, 5), torch.randn(5, n))], torch.empty(m, n), torch.randn(n), isa)
    check(
        [Term(torch.randn(m, n), w), Term(torch.randn(m, other.columns), other.t())], torch.empty(m, w.columns), isa=isa
    )


@each_isa
@pytest.mark.parametrize("block_size", [32, 128])
def test_each_weight_is_that_of_dequantize(block_size: int, isa: str) -> None:
    """Unit rows pick single weights: the order of nibbles and each block's scale, to the last bit."""
    data = nf4.quantize_reference(
        torch.randn(45, 256) * torch.logspace(-3, 3, 45 * 256).view(45, 256), "nf4", block_size, True
    )
    w = Codes(*data, 45, 256, "nf4", block_size)
    expected = nf4.dequantize_reference(*data, (45, 256), "nf4", block_size, torch.float32)
    along, across = torch.empty(256, 45), torch.empty(45, 256)
    wide_gemm([Term(torch.eye(256), w.t())], along, isa=isa)
    wide_gemm([Term(torch.eye(45), w)], across, isa=isa)
    assert torch.equal(along.t(), expected) and torch.equal(across, expected)


@each_isa
def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    w, _ = codes(200, 1088)
    x, h, b = torch.randn(130, 1088).bfloat16(), torch.randn(130, 16), torch.randn(200, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outs = torch.empty(130, 200), torch.empty(130, 1088), torch.empty(16, 1088)
            wide_gemm([Term(x, w.t()), Term(h, b.t())], outs[0], isa=isa)
            wide_gemm([Term(outs[0], w)], outs[1], isa=isa)
            wide_gemm([Term(h.t(), x)], outs[2], isa=isa)
            results.append(outs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for outs in results[1:] for a, b in zip(outs, results[0]))


@each_isa
def test_what_is_no_number_stays_in_its_row_and_column(isa: str) -> None:
    x, y = torch.randn(9, 64), torch.randn(64, 21)
    x[4, 3], y[5, 17] = torch.nan, torch.inf
    out = torch.empty(9, 21, dtype=torch.bfloat16)
    wide_gemm([Term(x, y)], out, isa=isa)
    finite = out.isfinite()
    assert not finite[4].any() and not finite[:, 17].any()
    finite[4], finite[:, 17] = True, True
    assert finite.all() and out[4].isnan().all()


@each_isa
def test_nothing_to_sum_and_no_rows(isa: str) -> None:
    out, bias = torch.full((3, 20), 7.0), torch.randn(20)
    wide_gemm([], out, bias, isa)
    assert torch.equal(out, bias.expand(3, 20))
    wide_gemm([Term(torch.empty(3, 0), torch.empty(0, 20))], out, isa=isa)
    assert not out.any()
    wide_gemm([Term(torch.empty(0, 64), codes(20, 64)[0].t())], torch.empty(0, 20), isa=isa)


def test_rows_that_repeat_are_read_where_they_are() -> None:
    check([Term(torch.randn(1, 70).expand(30, 70), torch.randn(70, 9))], torch.empty(30, 9))


def _bad() -> dict[str, tuple[list[Term], Tensor, Tensor | None, str]]:
    w, _ = codes(32, 64)
    x, out = torch.randn(5, 64), torch.empty(5, 32)
    return {
        "columns": ([Term(x[:, 1:], w.t())], out, None, r"right must be \[63, 32\], got codes of \[64, 32\]"),
        "rows": ([Term(x[1:], w.t())], out, None, r"left must be .* \[5, 64\] CPU tensor, got torch.float32 \[4, 64\]"),
        "dtype": ([Term(x.double(), w.t())], out, None, "got torch.float64"),
        "strides": ([Term(torch.randn(5, 128)[:, ::2][::2], w.t())], out[:3], None, "contiguous along one dimension"),
        "result": ([Term(x, w.t())], torch.empty(5, 32, dtype=torch.int8), None, "out must be a float32"),
        "device": ([Term(x.to("meta"), w.t())], out, None, "on meta"),
        "bias": ([Term(x, w.t())], out, torch.randn(31), "bias holds 31 elements, the product needs 32"),
        "blocks": ([Term(x, w._replace(block_size=4096).t())], out, None, "no multiple of 4096"),
        "codes": ([Term(x, w._replace(codes=w.codes[1:]).t())], out, None, "codes holds"),
        "type": ([Term(x, w._replace(quant_type="nf3").t())], out, None, "nf3"),
    }


@pytest.mark.parametrize("name", list(_bad()))
def test_bad_operands_are_named(name: str) -> None:
    terms, out, bias, message = _bad()[name]
    with pytest.raises(ValueError if name == "type" else KernelError, match=message):
        wide_gemm(terms, out, bias)


@pytest.mark.parametrize("allowed", ["avx2", "default"])
def test_it_runs_where_avx2_is_the_widest(allowed: str) -> None:
    program = """
import torch
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import dispatch
problem = dispatch.Problem("lora_linear", 512, (320,), 192, 8, torch.bfloat16, "nf4", 64)
names = [dispatch.choose(problem._replace(op=op)).name for op in ("lora_linear", "lora_linear_backward")]
print(kernels.find("wide_gemm", "cpu") is not None, *names)
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": allowed}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    expected = {"avx2": "True fused_fp32 fused_fp32", "default": "False fp32_gemm fp32_gemm"}[allowed]
    assert done.stdout.strip() == expected, done.stdout + done.stderr


def test_its_source_is_found() -> None:
    (source,) = kernels.source_files("wide_gemm", "cpu")
    assert "runtime/kernels/wide_gemm.cpp.jinja" in source.read_text()
