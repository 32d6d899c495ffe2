"""The torch codec against the installed bitsandbytes (CPU), bit for bit, and where bitsandbytes leaves things open."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import nf4
from qlora_compile.errors import ConfigError, InvalidWeightError

F = pytest.importorskip("bitsandbytes.functional")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "sparse", "constant", "zeros", "grid", "denormal", "any_scale", "all_scales")


@pytest.fixture(autouse=True)
def _no_inductor() -> Iterator[None]:
    """bitsandbytes compiles one of its dequantize paths with Inductor for each new shape: run it eagerly."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_weight(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=gen)
    if kind == "sparse":
        w[torch.rand(shape, generator=gen) < 0.9] = 0.0
    elif kind == "constant":
        w = torch.full(shape, 0.37 + seed % 7)
    elif kind == "zeros":
        w = w.round().clamp(0, 0) * w.sign()  # both signs of zero
    elif kind == "grid":
        w = (w * 4).round() / 4  # many values at midpoints and many equal scales
    elif kind == "denormal":
        w = w * 1e-41
    elif kind == "any_scale":
        w = w * 10.0 ** (seed % 76 - 42)
    elif kind == "all_scales":
        w = w * torch.logspace(-44, 1, w.numel()).view(shape)
    limit = min(1e36, torch.finfo(dtype).max)
    return w.clamp(-limit, limit).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


def bitsandbytes_dequantize(data: nf4.QuantizedData, n: int, quant_type: str, block_size: int, dtype: torch.dtype):
    """bitsandbytes' own dequantization of our bytes, as one row: its kernel is wrong where rows end inside a block."""
    state = F.QuantState(
        data.absmax, torch.Size([n]), F.get_4bit_type(quant_type, device="cpu"), block_size, quant_type, dtype
    )
    if data.absmax_scale is not None:
        state.offset, state.nested = data.absmax_offset, True
        state.state2 = F.QuantState(data.absmax_scale, code=F.create_dynamic_map(), blocksize=256, dtype=torch.float32)
    return F.dequantize_4bit(data.codes[:, None], state).reshape(-1)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_code_books_are_bitsandbytes(quant_type: str) -> None:
    assert same_bits(nf4.code_book(quant_type), F.get_4bit_type(quant_type, device="cpu"))
    assert nf4.code_book(quant_type).tolist() == list(nf4.CODE_BOOKS[quant_type])
    assert nf4.CODE_BOOKS["nf4"][1] == -0.6961928009986877
    assert nf4.CODE_BOOKS["fp4"][4] == pytest.approx(1 / 3)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_bitsandbytes(signed: bool) -> None:
    assert same_bits(nf4.dynamic_map(signed), F.create_dynamic_map(signed))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 130),
    block_size=st.sampled_from(nf4.BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_bytes_and_values_equal_bitsandbytes(
    rows: int,
    columns: int,
    block_size: int,
    quant_type: str,
    dtype: torch.dtype,
    double_quant: bool,
    kind: str,
    seed: int,
) -> None:
    w = make_weight(kind, (rows, columns), dtype, seed)
    theirs, state = F.quantize_4bit(w, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant)
    ours = nf4.quantize_reference(w, quant_type, block_size, double_quant)
    assert same_bits(ours.codes, theirs.view(-1))
    assert same_bits(ours.absmax, state.absmax)
    if double_quant:
        assert same_bits(ours.absmax_scale, state.state2.absmax)
        assert same_bits(ours.absmax_offset, state.offset)
    else:
        assert ours.absmax_scale is None and ours.absmax_offset is None
    values = nf4.dequantize_reference(*ours, w.shape, quant_type, block_size, dtype)
    assert values.shape == w.shape and values.dtype == dtype
    expected = bitsandbytes_dequantize(ours, w.numel(), quant_type, block_size, dtype)
    # Compared as values: fp4's second zero has either sign there, and bf16 denormals are zero on some machines.
    ours_flat = values.reshape(-1)
    if dtype == torch.bfloat16:
        smallest = torch.finfo(dtype).smallest_normal
        ours_flat = torch.where(ours_flat.abs() <= smallest, 0, ours_flat)
        expected = torch.where(expected.abs() <= smallest, 0, expected)
    assert torch.equal(ours_flat, expected)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-20, 1e-39, 1e-44])
def test_scale_codes_equal_bitsandbytes(scale: float) -> None:
    """Many scales, among them exact zeros and a block of nothing but zeros."""
    scales = torch.randn(256 * 400 + 77, generator=torch.Generator().manual_seed(3)) * scale
    scales[::7] *= torch.logspace(-8, 0, scales[::7].numel())
    scales[1::97] = 0.0
    scales[512:768] = 0.0
    codes, state = F.quantize_blockwise(scales, blocksize=256)
    ours, ours_scale = nf4.quantize_scales(scales)
    assert same_bits(ours, codes) and same_bits(ours_scale, state.absmax)
    assert (ours[512:768] == 0).all()
    offset = torch.tensor(0.3)
    decoded = F.dequantize_blockwise(codes, state) + offset
    assert same_bits(nf4.dequantize_scales(ours, ours_scale, offset), decoded)


def test_every_grid_point_of_the_scale_lookup() -> None:
    """Scales around each of the 65,536 grid steps, where rounding decides: a fused multiply-add's, not torch's."""
    steps = (torch.arange(65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1
    near = steps.float().clamp(-1, 1)
    values = torch.stack([near, near.nextafter(torch.tensor(2.0)), near.nextafter(torch.tensor(-2.0))]).view(-1)
    blocks = torch.cat([torch.ones(values.numel() // 192, 64), values.view(-1, 192)], dim=1).reshape(-1)
    codes, _ = F.quantize_blockwise(blocks, blocksize=256)
    assert same_bits(nf4.quantize_scales(blocks)[0], codes)


@pytest.mark.parametrize("chunk", [4096, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    w = make_weight("normal", (37, 911), dtype, 5)
    whole = nf4.quantize_reference(w, "nf4", 128, True)
    dense = nf4.dequantize_reference(*whole, w.shape, "nf4", 128, dtype)
    monkeypatch.setattr(nf4, "_CHUNK", chunk)
    parts = nf4.quantize_reference(w, "nf4", 128, True)
    assert all(same_bits(a, b) for a, b in zip(whole, parts, strict=True))
    assert same_bits(nf4.dequantize_reference(*parts, w.shape, "nf4", 128, dtype), dense)


def test_chunk_is_a_multiple_of_every_block() -> None:
    assert all(nf4._CHUNK % size == 0 for size in nf4.BLOCK_SIZES) and nf4._CHUNK % 2 == 0


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (0,), (0, 5)])
def test_tiny_tensors(shape: tuple[int, ...], double_quant: bool) -> None:
    w = torch.full(shape, -2.5)
    data = nf4.quantize_reference(w, "nf4", 64, double_quant)
    out = nf4.dequantize_reference(*data, shape, "nf4", 64, torch.float32)
    assert data.codes.numel() == math.ceil(w.numel() / 2)
    assert torch.equal(out, w)  # one scale: its own mean, so even double quantization is exact


def test_zero_blocks_have_the_code_of_zero_and_stay_zero() -> None:
    w = torch.zeros(5, 77)
    data = nf4.quantize_reference(w, "nf4", 64, double_quant=False)
    assert (data.codes[:-1] == 0x77).all() and data.codes[-1] == 0x77
    assert data.absmax[:-1].eq(0).all() and data.absmax[-1] == torch.tensor(1e-38)
    assert torch.equal(nf4.dequantize_reference(*data, w.shape, "nf4", 64, torch.float32), w)


def test_high_nibble_first_and_odd_size_padded_with_zero_code() -> None:
    data = nf4.quantize_reference(torch.tensor([1.0, -1.0, 1.0]), "nf4", 32, double_quant=False)
    assert data.codes.tolist() == [0xF0, 0xF7]


def test_strided_weight_is_read_row_major() -> None:
    w = torch.randn(48, 35, generator=torch.Generator().manual_seed(1)).t()
    a = nf4.quantize_reference(w, "fp4", 32, True)
    b = nf4.quantize_reference(w.contiguous(), "fp4", 32, True)
    assert not w.is_contiguous() and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_error_is_at_most_half_a_step() -> None:
    w = torch.randn(41, 530, generator=torch.Generator().manual_seed(2))
    data = nf4.quantize_reference(w, "nf4", 64, double_quant=False)
    out = nf4.dequantize_reference(*data, w.shape, "nf4", 64, torch.float32)
    absmax = data.absmax.repeat_interleave(64)[: w.numel()].view(w.shape)
    # Half of the widest gap of the code book (-1.0 to -0.696); 1e-6 for the fp32 products.
    assert ((w - out).abs() <= absmax * (0.3038072 / 2 + 1e-6)).all()


def test_tables_do_not_depend_on_the_callers_modes() -> None:
    """Imported first under another default device and dtype, used first under inference mode."""
    program = """
import torch
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"), torch.inference_mode():
    from qlora_compile import nf4
    tables = [nf4.dynamic_map(), *map(nf4.code_book, nf4.CODE_BOOKS), nf4.code_bounds("fp4")[0]]
assert all(t.dtype == torch.float32 and t.device.type == "cpu" and not t.is_inference() for t in tables)
assert nf4.CODE_BOOKS["fp4"][5] == 0.5 and nf4.CODE_BOOKS["fp4"][4] == torch.tensor(1 / 3, dtype=torch.float32).item()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"block_size must be one of .*got 48"):
        nf4.quantize_reference(torch.ones(3, 5), "nf4", 48, True)
    with pytest.raises(ConfigError, match=r"quant_type must be one of nf4, fp4, got 'int4'"):
        nf4.quantize_reference(torch.ones(3, 5), "int4", 64, True)
    with pytest.raises(InvalidWeightError, match="got float64"):
        nf4.quantize_reference(torch.ones(3, 5, dtype=torch.float64), "nf4", 64, True)
