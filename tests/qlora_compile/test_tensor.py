"""`QuantizedTensor`: what it keeps in 4 bits, what it dequantizes for, how it is stored, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_compile as qc
from qlora_compile import nf4
from qlora_compile.errors import ConfigError, InvalidWeightError, ModelStateError
from qlora_compile.tensor import QuantizedTensor, quantize_like

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (29, 45)  # 1305 values: 20 blocks of 64 and 25 values, an odd number of codes


def make(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, **options: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(7)
    return qc.quantize_4bit(torch.randn(shape, generator=generator).to(dtype), **options)


def same_parts(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = list(zip(a.data_4bit, b.data_4bit, strict=True))
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in pairs)


# --- outer and inner form ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_outer_form_is_the_dense_weights_and_inner_form_is_bitsandbytes(dtype: torch.dtype, double_quant: bool):
    q = make(dtype, double_quant=double_quant)
    assert (q.shape, q.stride(), q.dtype, q.device) == (SHAPE, (45, 1), dtype, torch.device("cpu"))
    assert (q.quant_type, q.block_size, q.double_quant, q.transposed) == ("nf4", 64, double_quant, False)
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (653,)
    assert q.absmax.shape == (21,) and q.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
    if double_quant:
        assert q.absmax_scale.shape == (1,) and q.absmax_offset.shape == ()
    else:
        assert q.absmax_scale is None and q.absmax_offset is None
    assert q.dequantize().dtype == dtype and q.dequantize().shape == SHAPE


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_the_reference_codecs(dtype: torch.dtype):
    weight = torch.randn(SHAPE).to(dtype)
    q = qc.quantize_4bit(weight, quant_type="fp4", block_size=32)
    data = nf4.quantize_reference(weight, "fp4", 32, True)
    expected = nf4.dequantize_reference(*data, SHAPE, "fp4", 32, dtype)
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(qc.dequantize_4bit(q), expected)


def test_stored_bits_of_a_real_weight_are_at_most_4_13():
    q = make(torch.bfloat16, (512, 1536))
    assert q.stored_bytes == 512 * 1536 // 2 + 12288 + 48 * 4 + 4  # codes, scales, scales' scales, offset
    assert q.stored_bytes * 8 / q.numel() <= 4.13


def test_printing_names_what_it_is_and_does_not_dequantize():
    text = "QuantizedTensor((29, 45), torch.bfloat16, nf4, block_size=64, double_quant, device='cpu')"
    assert repr(make(torch.bfloat16)) == text
    assert "double_quant" not in repr(make(double_quant=False))
    module = nn.Linear(45, 29)
    module.weight = nn.Parameter(make(), requires_grad=False)
    assert "QuantizedTensor((29, 45), torch.float32, nf4" in repr(module.weight)


# --- ops that keep the 4 bits ---


def test_clone_and_deepcopy_own_their_storage():
    q = make()
    for other in (q.clone(), copy.deepcopy(q)):
        assert isinstance(other, QuantizedTensor) and same_parts(q, other)
        pairs = zip(q.data_4bit, other.data_4bit, strict=True)
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


def test_deepcopy_keeps_a_parameter_a_parameter_and_shared_ones_shared():
    weight = nn.Parameter(make(), requires_grad=False)
    first, second = copy.deepcopy([weight, weight])
    assert first is second and first is not weight
    assert isinstance(first, nn.Parameter) and not first.requires_grad
    assert same_parts(first, weight)


def test_detach_shares_storage():
    q = make()
    assert isinstance(q.detach(), QuantizedTensor)
    assert q.detach().codes.data_ptr() == q.codes.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_dtype_changes_what_it_dequantizes_to_and_no_code(dtype: torch.dtype):
    q = make(torch.float32)
    moved = q.to(dtype)
    assert isinstance(moved, QuantizedTensor) and moved.dtype == dtype and same_parts(q, moved)
    # one rounding from the fp32 product, which is what q itself gives
    assert torch.equal(moved.dequantize(), q.dequantize().to(dtype))


def test_to_an_integer_dtype_gives_a_dense_tensor():
    q = make()
    assert type(q.to(torch.int32)) is Tensor
    assert torch.equal(q.to(torch.int32), q.dequantize().to(torch.int32))


def test_to_the_meta_device_keeps_the_layout():
    q = make(torch.bfloat16).to("meta")
    assert isinstance(q, QuantizedTensor) and q.device.type == "meta" and q.codes.device.type == "meta"
    assert q.dequantize().shape == SHAPE and q.dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize(
    "view",
    [
        lambda q: q.t(),
        lambda q: q.T,
        lambda q: q.mT,
        lambda q: q.transpose(0, 1),
        lambda q: q.transpose(-1, -2),
        lambda q: q.permute(1, 0),
        lambda q: q.swapaxes(0, 1),
    ],
)
def test_every_spelling_of_a_transpose_stays_4_bit(view: Callable[[Tensor], Tensor]):
    q = make(torch.bfloat16)
    turned = view(q)
    assert isinstance(turned, QuantizedTensor) and turned.transposed
    assert turned.shape == (45, 29) and turned.stride() == (1, 45)
    assert torch.equal(turned.dequantize(), q.dequantize().t())
    assert turned.dequantize().stride() == (1, 45)
    back = view(turned)
    assert not back.transposed and back.shape == SHAPE and torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("view", [lambda q: q.transpose(0, 0), lambda q: q.transpose(1, -1), lambda q: q.permute(0, 1)])
def test_a_transpose_of_nothing_changes_nothing(view: Callable[[Tensor], Tensor]):
    q = make()
    same = view(q)
    assert isinstance(same, QuantizedTensor) and not same.transposed and same.shape == SHAPE


def test_other_tensor_ranks_transpose_densely():
    q = make(shape=(3, 5, 7))
    turned = q.transpose(0, 2)
    assert type(turned) is Tensor and torch.equal(turned, q.dequantize().transpose(0, 2))


@pytest.mark.parametrize(
    "run",
    [
        lambda q: q + 1,
        lambda q: q[3:9, 1],
        lambda q: q.sum(0),
        lambda q: torch.cat([q, q]),
        lambda q: q.view(-1)[:7],
        lambda q: torch.ones(3, 29) @ q,
        lambda q: q.float().norm(),
        lambda q: torch.stack([q.t(), q.t()]),
    ],
)
def test_ops_that_it_does_not_know_dequantize_and_run(run: Callable[[Tensor], Tensor]):
    q = make()
    out = run(q)
    assert type(out) is Tensor
    # products sum 29 terms in fp32, in whatever order
    torch.testing.assert_close(out, run(q.dequantize()), rtol=1e-5, atol=1e-5)


def test_transposed_storage_is_that_of_the_transposed_weight():
    """GPT-2's Conv1D: the weight is [in, out], the codes follow [out, in]."""
    weight = torch.randn(29, 45, dtype=torch.bfloat16)
    q = qc.quantize_4bit(weight, transposed=True)
    assert q.transposed and q.shape == (29, 45) and q.stride() == (45, 1)
    assert same_parts(q, qc.quantize_4bit(weight.t().contiguous()))
    dense = q.dequantize()
    assert dense.stride() == (45, 1)
    assert torch.equal(dense, qc.quantize_4bit(weight.t().contiguous()).dequantize().t())
    assert not torch.equal(dense, qc.quantize_4bit(weight).dequantize())  # the blocks run the other way


def test_a_weight_with_other_strides_keeps_them():
    weight = torch.randn(45, 29).t()
    q = qc.quantize_4bit(weight)
    assert not weight.is_contiguous()
    assert q.stride() == q.dequantize().stride() == weight.stride()
    assert torch.equal(q.dequantize(), qc.quantize_4bit(weight.contiguous()).dequantize())


# --- writing ---


def test_copy_of_a_dense_tensor_quantizes_again_in_place():
    q, new = make(torch.bfloat16, block_size=32), torch.randn(SHAPE)
    pointer = q.codes.data_ptr()
    q.copy_(new)
    assert q.codes.data_ptr() == pointer
    assert same_parts(q, qc.quantize_4bit(new.bfloat16(), block_size=32))


def test_copy_of_a_quantized_tensor_copies_the_bytes():
    q, other = make(), qc.quantize_4bit(torch.randn(SHAPE))
    q.copy_(other)
    assert same_parts(q, other) and q.codes.data_ptr() != other.codes.data_ptr()


def test_copy_from_another_layout_goes_through_its_values():
    q, other = make(block_size=64), qc.quantize_4bit(torch.randn(SHAPE), quant_type="fp4", double_quant=False)
    q.copy_(other)
    assert q.quant_type == "nf4" and same_parts(q, quantize_like(other.dequantize(), q))


def test_copy_into_a_dense_tensor_dequantizes():
    q, dense = make(torch.bfloat16), torch.empty(SHAPE)
    dense.copy_(q)
    assert torch.equal(dense, q.dequantize().float())


def test_copy_of_another_shape_is_refused():
    with pytest.raises(ModelStateError, match=r"shape \(45, 29\) cannot be copied into QuantizedTensor\(\(29, 45\)"):
        make().copy_(torch.randn(45, 29))


@pytest.mark.parametrize(
    "write",
    [
        lambda q: q.add_(1),
        lambda q: q.mul_(2),
        lambda q: q.zero_(),
        lambda q: q.normal_(),
        lambda q: q.fill_(0.5),
        lambda q: q.__setitem__((0, 0), 1.0),
        lambda q: torch.add(q.dequantize(), 1, out=q),
        lambda q: torch._foreach_add_([torch.ones(3), q], 1.0),
    ],
)
def test_writing_in_place_is_refused_and_nothing_changes(write: Callable[[QuantizedTensor], Any]):
    q = make()
    before = q.clone()
    with pytest.raises(ModelStateError, match=r"4-bit weight.*dequantize\(\) it first"):
        write(q)
    assert same_parts(q, before)


# --- public functions ---


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantize_into_out(dtype: torch.dtype):
    q, out = make(torch.bfloat16), torch.full(SHAPE, 9.0, dtype=dtype)
    assert qc.dequantize_4bit(q, out=out) is out
    # out's dtype holds: one rounding from fp32, so an fp32 out is more precise than the bf16 weight
    assert torch.equal(out, q.to(torch.float32).dequantize().to(dtype))


def test_dequantize_into_out_that_is_not_contiguous_or_transposed():
    q = make()
    out = torch.zeros(45, 29).t()
    assert torch.equal(qc.dequantize_4bit(q, out=out), q.dequantize())
    turned = torch.zeros(45, 29)
    assert torch.equal(qc.dequantize_4bit(q.t(), out=turned), q.dequantize().t())


def test_out_of_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"\(29, 45\), got \(45, 29\)"):
        qc.dequantize_4bit(make(), out=torch.empty(45, 29))


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_denormals_and_a_single_value(double_quant: bool):
    zeros = qc.quantize_4bit(torch.zeros(3, 77), double_quant=double_quant)
    assert torch.equal(zeros.dequantize(), torch.zeros(3, 77))
    tiny = qc.quantize_4bit(torch.full((3, 77), 1e-41), double_quant=double_quant).dequantize()
    assert bool(torch.isfinite(tiny).all())
    one = qc.quantize_4bit(torch.tensor([-2.5]), double_quant=double_quant)
    assert one.codes.shape == (1,) and one.absmax.shape == (1,)
    torch.testing.assert_close(one.dequantize(), torch.tensor([-2.5]))  # code -1 times its own absmax


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype, double_quant: bool):
    for index in ((0, 0), (17, 31), (28, 44)):
        weight = torch.randn(SHAPE).to(dtype)
        weight[index] = bad
        with pytest.raises(InvalidWeightError, match="NaN or infinity"):
            qc.quantize_4bit(weight, double_quant=double_quant)


def test_wrong_arguments_are_refused():
    with pytest.raises(ConfigError, match="quant_type must be one of nf4, fp4, got 'nf8'"):
        qc.quantize_4bit(torch.randn(3, 5), quant_type="nf8")
    with pytest.raises(ConfigError, match=r"block_size must be one of 32, .*, got 48"):
        qc.quantize_4bit(torch.randn(3, 5), block_size=48)
    with pytest.raises(InvalidWeightError, match=r"torch\.int8"):
        qc.quantize_4bit(torch.ones(3, 5, dtype=torch.int8))
    with pytest.raises(InvalidWeightError, match=r"2-D.*\(3, 5, 7\)"):
        qc.quantize_4bit(torch.randn(3, 5, 7), transposed=True)


def test_meta_weights_quantize_without_values():
    q = qc.quantize_4bit(torch.empty(29, 45, device="meta", dtype=torch.bfloat16))
    assert q.device.type == "meta" and q.codes.shape == (653,) and q.shape == (29, 45)
