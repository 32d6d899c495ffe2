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
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from ... import nf4
from ...config import COMPUTE_DTYPES
from ...errors import CheckpointError
from ...tensor import Layout, QuantizedTensor

STATE_PREFIX = "quant_state.bitsandbytes__"
# What stands beside a weight's codes, by the ending that it adds to the weight's name.
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE_PREFIX}nf4", f"{STATE_PREFIX}fp4")
_MAX_VALUES = 2**48  # above it a shape is a lie, and its product no size


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
        tensors[f"{key}.nested_quant_map"] = nf4.dynamic_map().clone()  # no file may hold shared tensors
    raw = json.dumps(state).encode()
    tensors[f"{key}.quant_state.bitsandbytes__{weight.quant_type}"] = torch.tensor(list(raw), dtype=torch.uint8)
    return tensors


def quantized_keys(names: Iterable[str]) -> dict[str, str]:
    """Weight -> the name of its quant_state, for each 4-bit weight of a checkpoint. Raises CheckpointError (two states)."""
    found: dict[str, str] = {}
    for name in names:
        key, dot, kind = name.partition(f".{STATE_PREFIX}")
        if dot and found.setdefault(key, name) != name:
            raise CheckpointError(f"{key} has two quantization states, {found[key]} and {name}.")
        if dot and kind not in nf4.CODE_BOOKS:
            raise CheckpointError(f"{key} is quantized as {kind!r}; only {', '.join(nf4.CODE_BOOKS)} can be read.")
    return found


def read_state(key: str, raw: torch.Tensor) -> dict[str, Any]:
    """The JSON beside a 4-bit weight, checked: quant_type, blocksize, dtype, shape, nested_*. Raises CheckpointError."""
    try:
        state = json.loads(raw.to(torch.uint8).numpy().tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The quantization state of {key} is corrupt: {error}.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"The quantization state of {key} is a JSON {type(state).__name__}, not an object.")
    shape = state.get("shape")
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < _MAX_VALUES for n in shape)
    checks = {
        "quant_type": state.get("quant_type") in nf4.CODE_BOOKS,
        "blocksize": type(state.get("blocksize")) is int and state["blocksize"] in nf4.BLOCK_SIZES,
        "dtype": isinstance(state.get("dtype"), str) and state["dtype"] in COMPUTE_DTYPES,
        "shape": whole and prod(shape or []) < _MAX_VALUES,
    }
    if "nested_offset" in state:
        offset = state["nested_offset"]
        checks["nested_offset"] = (
            isinstance(offset, float | int) and not isinstance(offset, bool) and abs(offset) < 1e30
        )
        checks["nested_blocksize"] = state.get("nested_blocksize") == nf4.SCALE_BLOCK_SIZE
        checks["nested_dtype"] = state.get("nested_dtype", "float32") == "float32"
    for name, good in checks.items():
        if not good:
            raise CheckpointError(f"{key} is quantized with {name}={state.get(name)!r}, which cannot be read.")
    return state


def unpack_weight(
    key: str, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None, transposed: bool = False
) -> QuantizedTensor:
    """What `pack_weight` gave -> the same codes and scales as a QuantizedTensor, nothing quantized again.

    `dtype` is what it stands for (None: what the file says). `transposed`: the file holds `W.t()` of a W [in, out]
    (Conv1D). Raises CheckpointError: a part is missing, of another size or type, or of another code book.
    """
    name = next((n for n in tensors if n.startswith(f"{key}.{STATE_PREFIX}")), None)
    if name is None:
        raise CheckpointError(f"{key} has no quantization state.")
    state = read_state(key, tensors[name])
    if not name.endswith(f"__{state['quant_type']}"):
        raise CheckpointError(f"{name} says in itself that it is {state['quant_type']}.")
    count, nested = prod(state["shape"]), "nested_offset" in state
    blocks = -(-count // state["blocksize"])
    book = torch.tensor(nf4.CODE_BOOKS[state["quant_type"]], dtype=torch.float32)
    parts = [("absmax", torch.uint8 if nested else torch.float32, blocks), ("quant_map", torch.float32, 16)]
    if nested:
        parts += [("nested_absmax", torch.float32, -(-blocks // nf4.SCALE_BLOCK_SIZE))]
        parts += [("nested_quant_map", torch.float32, 256)]
    found = {part: tensors.get(f"{key}.{part}") for part, _, _ in parts}
    for part, wanted, size in parts:
        tensor = found[part]
        if tensor is None or tensor.dtype != wanted or tensor.numel() != size:
            has = "is missing" if tensor is None else f"is {tensor.dtype} of {tensor.numel()} values"
            raise CheckpointError(f"{key}.{part} {has}, it should be {wanted} of {size}.")
    codes = tensors[key].contiguous().view(-1).view(torch.uint8)  # bnb_4bit_quant_storage may be any dtype
    if codes.numel() not in ((count + 1) // 2, -(-((count + 1) // 2) // tensors[key].itemsize) * tensors[key].itemsize):
        raise CheckpointError(f"{key} holds {codes.numel()} bytes of codes, {(count + 1) // 2} are needed.")
    same = torch.equal(found["quant_map"], book)  # type: ignore[arg-type]
    if not same or (nested and not torch.equal(found["nested_quant_map"], nf4.dynamic_map())):  # type: ignore[arg-type]
        raise CheckpointError(f"{key} was quantized with another code book than {state['quant_type']}'s.")
    data = nf4.QuantizedData(
        codes[: (count + 1) // 2].clone(),
        found["absmax"].reshape(-1).clone(),  # type: ignore[union-attr]
        found["nested_absmax"].reshape(-1).clone() if nested else None,  # type: ignore[union-attr]
        torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None,
    )
    shape = tuple(reversed(state["shape"])) if transposed else tuple(state["shape"])
    stride = torch.empty(shape, device="meta").stride()
    layout = Layout(
        state["quant_type"], state["blocksize"], transposed, shape, stride, dtype or COMPUTE_DTYPES[state["dtype"]]
    )
    return QuantizedTensor(data, layout)


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
