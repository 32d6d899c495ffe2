"""bitsandbytes' 4-bit tensors in safetensors: one quantized weight <-> the tensors that `Linear4bit` saves for it.

For a weight P of shape [N, K] in blocks of B values, nb = ceil(N * K / B):

    P                                  uint8   [ceil(N * K / 2), 1]   codes, high nibble first, row-major
    P.absmax                           uint8 or fp32 [nb]             codes if double-quantized, else the scales
    P.quant_map                        fp32    [16]                   code book
    P.nested_absmax                    fp32    [ceil(nb / 256)]       only double-quantized
    P.nested_quant_map                 fp32    [256]                  only double-quantized
    P.quant_state.bitsandbytes__nf4    uint8   [bytes]                JSON with the numbers

Source: bitsandbytes 0.50.2, `functional.QuantState.as_dict(packed=True)` and `nn.modules.Linear4bit`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ... import nf4
from ...tensor import QuantizedTensor


def pack_weight(key: str, weight: QuantizedTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors to save for the parameter `key`; `dtype` is what the weight dequantizes to when it is loaded."""
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.layout_4bit.inner_shape),
    }
    tensors = {
        key: weight.codes.reshape(-1, 1),
        f"{key}.absmax": weight.absmax,
        f"{key}.quant_map": torch.tensor(nf4.CODE_BOOKS[weight.quant_type], dtype=torch.float32),
    }
    if weight.absmax_scale is not None and weight.absmax_offset is not None:
        state["nested_blocksize"] = nf4.SCALE_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.absmax_offset.item()
        tensors[f"{key}.nested_absmax"] = weight.absmax_scale
        tensors[f"{key}.nested_quant_map"] = nf4.dynamic_map()
    raw = json.dumps(state).encode()
    tensors[f"{key}.quant_state.bitsandbytes__{weight.quant_type}"] = torch.tensor(list(raw), dtype=torch.uint8)
    return tensors


def quantization_config(
    quant_type: str, double_quant: bool, skip_modules: Sequence[str], compute_dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """config.json's `quantization_config`, as transformers' BitsAndBytesConfig writes it."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
