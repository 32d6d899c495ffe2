"""Bytes kept and sent by formula. That real runs keep and send just these: tests/distributed/test_fsdp.py."""

from __future__ import annotations

import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.config import QLoRAConfig
from qlora_compile.scaling import Group, Parts


def test_stored_bytes_are_those_of_quantized_weights() -> None:
    for shape, options in (((300, 96), {"block_size": 32}), ((77, 50), {}), ((77, 50), {"double_quant": False})):
        group = Group((shape,), (), QLoRAConfig(**options))
        assert group.four_bit_bytes == qc.quantize_4bit(torch.randn(shape), **options).stored_bytes


def test_codes_are_a_quarter_of_bf16_traffic() -> None:
    group = Group(((4096, 4096), (14336, 4096)), (), QLoRAConfig(r=0))
    assert 0.257 < group.gathered(8) / (2 * 4096 * (4096 + 14336)) < 0.259
    assert group.kept(8) * 8 < group.four_bit_bytes * 1.01


def test_adapters_of_few_rows_are_split_by_columns() -> None:
    """16 rows of A on 64 ranks: by rows each would be one of 64; by columns nothing is padded."""
    group = Group(((4096, 4096),), (), QLoRAConfig(r=16))
    assert group.adapter_part(64) == 16 * 4096 // 64 + 64 * 16
    odd = Group(((4096, 4095),), (), QLoRAConfig(r=16))
    assert odd.adapter_part(64) == 4095 + 64 * 16


def test_parts_of_a_model_count_every_parameter_once() -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64)) for _ in range(3))
        model = nn.ModuleDict(
            {"embed": nn.Embedding(50, 64), "blocks": blocks, "lm_head": nn.Linear(64, 50, bias=False)}
        )
        model["lm_head"].weight = model["embed"].weight
    config = QLoRAConfig(r=4, block_size=32)
    parts = Parts.of(model, blocks, config)
    assert parts.root.linears == () and parts.root.dense == (((50, 64), 4),)
    assert [group.linears for group in parts.blocks] == [((96, 64), (64, 96))] * 3
    assert parts.adapter_values == 3 * 2 * 4 * (96 + 64)
    assert parts.stored_bytes == sum(group.four_bit_bytes + group.dense_bytes for group in (*parts.blocks, parts.root))
    assert parts.kept(1) == parts.stored_bytes + 4 * parts.adapter_values
