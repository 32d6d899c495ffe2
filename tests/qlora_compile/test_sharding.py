"""`QuantizedShard`: rows of a 4-bit weight as views, exact; what is refused. FSDP2 itself: tests/distributed."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import ModelStateError
from qlora_compile.sharding import QuantizedShard, stored_form
from qlora_compile.tensor import QuantizedTensor

ROWS, COLUMNS = 1111, 96  # 1.5 blocks of 64 a row: a part may begin at even rows only; 1667 blocks, 6.5 scale blocks


def make(rows: int = ROWS, columns: int = COLUMNS, **options: Any) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(5)
    return qc.quantize_4bit(torch.randn(rows, columns, generator=generator).to(torch.bfloat16), **options)


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"quant_type": "fp4", "block_size": 32}])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_split_rows_are_views_and_exact(options: dict[str, Any], parts: int) -> None:
    weight = make(**options)
    size = 2 * -(-ROWS // (2 * parts))  # even
    found = torch.split(weight, size)
    assert all(isinstance(part, QuantizedShard) for part in found)
    assert torch.equal(torch.cat([part.dequantize() for part in found]), weight.dequantize())
    assert found[1].codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    again = torch.cat([piece.dequantize() for part in found for piece in part.split(2)])
    assert torch.equal(again, weight.dequantize())


class Mesh:
    """As much of a DeviceMesh as is asked for."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((50, 128), {}),
        ((50, 128), {"double_quant": False}),
        ((5, 33, 70), {"per_expert": True}),
        ((8, 33, 70), {"per_expert": True, "double_quant": False}),
    ],
)
def test_what_is_gathered_is_the_weight_byte_for_byte(shape: Any, options: dict[str, Any], ranks: int) -> None:
    """As FSDP2 does it: equal parts of every rank, empty ones among them, laid end to end."""
    weight = qc.quantize_4bit(torch.randn(shape, generator=torch.Generator().manual_seed(9)), **options)
    shards = list(weight.split(-(-shape[0] // ranks)))
    assert torch.equal(torch.cat([shard.dequantize() for shard in shards]), weight.dequantize())
    shards += [shards[0][0:0]] * (ranks - len(shards))
    sent = [shard.fsdp_pre_all_gather(Mesh(ranks)) for shard in shards]
    gathered = tuple(torch.cat(parts) for parts in zip(*(parts for parts, _ in sent)))
    assert len({tuple(part.shape for part in parts) for parts, _ in sent}) == 1
    whole, _ = shards[0].fsdp_post_all_gather(gathered, sent[0][1], torch.float32)
    for part, original in zip(whole.data_4bit, weight.data_4bit, strict=True):
        assert (part is None and original is None) or torch.equal(part, original)
    assert torch.equal(whole.dequantize(), weight.dequantize())


def test_other_ops_get_dense_rows() -> None:
    weight = make()
    shard = weight[400:600]
    assert isinstance(shard, QuantizedShard) and shard.shape == (200, COLUMNS)
    x = torch.randn(3, COLUMNS, dtype=torch.bfloat16)
    assert torch.equal(
        torch.nn.functional.linear(x, shard), torch.nn.functional.linear(x, weight.dequantize()[400:600])
    )
    assert torch.equal(shard + 1, weight.dequantize()[400:600] + 1)
    assert "of (1111, 96)" in repr(shard)


def test_parts_that_begin_inside_a_block_are_dense() -> None:
    weight = make()
    for part in (weight[1:5], weight.split(555)[1], weight[:, :32], weight.new_zeros(4, COLUMNS)):
        assert type(part) is torch.Tensor
    assert torch.equal(weight[1:5], weight.dequantize()[1:5])


def test_copies_rows_byte_for_byte_and_refuses_everything_else() -> None:
    source, dest = make(), qc.quantize_4bit(torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16))
    for mine, theirs in zip(dest.split(278), source.split(278), strict=True):
        mine.copy_(theirs)
    assert torch.equal(dest.codes, source.codes) and torch.equal(dest.absmax, source.absmax)
    assert torch.equal(dest.dequantize(), source.dequantize())
    rows = dest[0:278]
    with pytest.raises(ModelStateError, match="takes rows in 4 bits"):
        rows.copy_(torch.zeros(278, COLUMNS))
    with pytest.raises(ModelStateError, match="another format"):
        rows.copy_(make(block_size=32)[0:278])
    with pytest.raises(ModelStateError, match="would write into a 4-bit weight"):
        rows.add_(1)


def test_copying_a_weights_own_values_into_it_changes_nothing() -> None:
    """DDP sends the parameters as dense values when it is made, and copies them into the model that they came from."""
    weight = make()
    before = [part.clone() for part in weight.data_4bit if part is not None]
    weight.copy_(weight.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(before, weight.data_4bit, strict=True))
    other = torch.randn(ROWS, COLUMNS).to(torch.bfloat16)
    weight.copy_(other)
    assert torch.equal(weight.codes, qc.quantize_4bit(other).codes)


def test_saved_alone_and_loaded_without_pickled_code() -> None:
    shard = make()[400:600]
    file = io.BytesIO()
    torch.save(shard, file)
    assert file.tell() < 200 * COLUMNS  # the rows, not the weight that they are a view of
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, QuantizedShard) and torch.equal(loaded.dequantize(), shard.dequantize())


def test_the_4_bit_form_is_found_whole_or_in_part() -> None:
    weight = make()
    assert stored_form(weight) is weight and stored_form(weight[0:2]) is not None
    assert stored_form(weight.dequantize()) is None
