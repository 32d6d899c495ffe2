"""More than 2^31 weights in one matrix, on a CPU: the places around 2^31 are as they are in a small one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import cpp_build, cpu

ROWS, COLUMNS, BLOCK = 65_700, 32_768, 64
RAGGED = 3 * BLOCK + 5  # elements behind the matrix, for the codec
GROUP = 256 * BLOCK  # elements that share a second scale
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpp_build.find_compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(MEMORY < 16e9, reason="needs 9 GB of memory"),
]


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, their scales and the offset of ROWS * COLUMNS + RAGGED weights."""
    numel = ROWS * COLUMNS + RAGGED
    assert numel > 2**31
    generator = torch.Generator().manual_seed(0)
    blocks = -(-numel // BLOCK)
    codes = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8, generator=generator)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    return codes, absmax, torch.rand(-(-blocks // 256), generator=generator), torch.tensor(0.3)


def test_the_codec(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    codes, absmax, scale, offset = data
    numel = ROWS * COLUMNS + RAGGED
    dequantize, quantize = (kernels.find(f"{op}_4bit", "cpu") for op in ("dequantize", "quantize"))
    assert dequantize is not None and quantize is not None
    out = torch.empty(numel, dtype=torch.bfloat16)
    last = numel // GROUP
    for isa in cpu.supported_isas():
        out.zero_()
        dequantize(codes, absmax, scale, offset, numel, "nf4", BLOCK, out, isa=isa)
        for group in (0, 2**31 // GROUP - 1, 2**31 // GROUP, 2**31 // GROUP + 1, last - 1, last):
            begin, end = group * GROUP, min((group + 1) * GROUP, numel)
            parts = (
                codes[begin // 2 : -(-end // 2)],
                absmax[begin // BLOCK : -(-end // BLOCK)],
                scale[group : group + 1],
            )
            expected = nf4.dequantize_reference(*parts, offset, (end - begin,), "nf4", BLOCK, torch.bfloat16)
            assert torch.equal(out[begin:end].view(torch.int16), expected.view(torch.int16))
    found = quantize(out, "nf4", BLOCK, False)
    for begin in (0, 2**31 - 10 * BLOCK, 2**31, numel // BLOCK * BLOCK - 10 * BLOCK):
        end = min(begin + 20 * BLOCK, numel)
        small = nf4.quantize_reference(out[begin:end], "nf4", BLOCK, False)
        assert torch.equal(found.codes[begin // 2 : -(-end // 2)], small.codes)
        assert torch.equal(found.absmax[begin // BLOCK : -(-end // BLOCK)], small.absmax)


def test_a_row_of_x(data: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    codes, absmax, scale, offset = data
    numel = ROWS * COLUMNS
    linear = kernels.find("wide_linear_4bit_small", "cpu")
    assert linear is not None
    x, y = torch.randn(2, COLUMNS), torch.empty(2, ROWS)
    blocks = numel // BLOCK
    parts = codes[: numel // 2], absmax[:blocks], scale[: -(-blocks // 256)], offset
    linear(x, *parts, ROWS, COLUMNS, "nf4", BLOCK, y)
    for row in (0, 65_535, 65_536, 65_537, ROWS - 1):  # 2^31 / COLUMNS = 65536; two rows of W share a second scale
        begin, group = row * COLUMNS, row * COLUMNS // GROUP
        mine = codes[begin // 2 : (begin + COLUMNS) // 2], absmax[begin // BLOCK : (begin + COLUMNS) // BLOCK]
        weight = nf4.dequantize_reference(
            *mine, scale[group : group + 2], offset, (COLUMNS,), "nf4", BLOCK, torch.float32
        )
        # fp32 sums of 32768 terms of size 1 in another order
        torch.testing.assert_close(y[:, row], x @ weight, atol=0.02, rtol=1e-4)
