"""Models that other tools adapted or quantized: PEFT's LoRA layers and bitsandbytes' 4-bit weights, by their attributes.

Neither package is imported: a model that holds their objects has imported them. Nothing is written here either; a model
of theirs keeps the state that they gave it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import nf4

_PACKED_ROWS = 32  # output features side by side in the layout for AVX-512 (bitsandbytes 0.50.2, functional.py)


def is_peft_layer(module: nn.Module) -> bool:
    """A LoRA layer of PEFT, whatever it wraps."""
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def is_peft_model(model: nn.Module) -> bool:
    """Whether PEFT put adapters of any kind into it."""
    return any(type(module).__module__.startswith("peft.tuners") for module in model.modules())


def tuner_kinds(model: nn.Module) -> dict[str, str]:
    """Layers that PEFT put in a linear's place, for an adapter of any kind: name -> the kind (lora, ia3, vera, ...)."""
    found = {name: type(m).__module__.split(".") for name, m in model.named_modules() if hasattr(m, "base_layer")}
    return {name: parts[2] for name, parts in found.items() if parts[:2] == ["peft", "tuners"]}


def is_bnb_weight(param: object) -> bool:
    """A 4-bit weight of bitsandbytes (`Params4bit`), quantized already."""
    return type(param).__name__ == "Params4bit" and getattr(param, "quant_state", None) is not None


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """name -> LoRA layer of PEFT, in module order."""
    return {name: module for name, module in model.named_modules() if is_peft_layer(module)}


def expected_adapters(layer: Any) -> list[str]:
    """The adapters whose branches the layer's forward adds: none where they are disabled or merged."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def variant_of(layer: Any, names: Iterable[str]) -> str:
    """Which of these adapters is more than B A x, in PEFT's own words: DoRA, aLoRA, ...; "" where none is."""
    for name in names:
        if (variant := getattr(layer, "lora_variant", {}).get(name)) is not None:
            kind = type(variant).__name__.removesuffix("Variant").removesuffix("Linear")
            return f"its adapter {name!r} is {kind}"
    return ""


def special_adapter(layer: Any) -> str:
    """Why an adapter in use here runs as traced, or "" where it can be read as a branch B A x."""
    names = expected_adapters(layer)
    if kind := variant_of(layer, names):
        return f"{kind}, which runs as traced"
    biased = next((name for name in names if getattr(layer.lora_B[name], "bias", None) is not None), None)
    return f"its adapter {biased!r} has a bias (lora_bias), which runs as traced" if biased else ""


class Unpacked(NamedTuple):
    """A repacked weight in the standard layout: a copy."""

    codes: Tensor  # uint8 [n / 2], high nibble first
    absmax: Tensor  # fp32 [n / block size]


def is_repacked(param: Any) -> bool:
    """Whether bitsandbytes has put this weight into its layout for AVX-512 (it does so on the first evaluation)."""
    return bool(getattr(param.quant_state, "packing_format_for_cpu", False))


def unpack(param: Any) -> Unpacked:
    """The codes and scales of a repacked weight, in the standard layout.

    Repacked: bytes [N / 32, K / 2, 32], byte i of a group of 32 holding the value of row i (low nibble) and of row
    i + 32 (high) of 64 consecutive ones; scales bf16 [K / block size, N]. Their rounding to bf16 stays: it is what the
    model has computed with since. (`functional._convert_weight_packed_for_cpu`, bitsandbytes 0.50.2.)
    """
    state = param.quant_state
    n, k = state.shape
    packed = param.data.reshape(-1, _PACKED_ROWS)
    values = torch.cat([packed & 15, packed >> 4], dim=1).view(n // _PACKED_ROWS, k // 2, _PACKED_ROWS, 2)
    values = values.transpose(1, 2).reshape(-1, 2)
    codes = (values[:, 0] << 4) | values[:, 1]
    return Unpacked(codes, state.absmax.t().reshape(-1).float())


def bnb_decline_reason(param: Any) -> str | None:
    """Why the ops of ours cannot compute with this weight of bitsandbytes, or None."""
    state = param.quant_state
    if state.quant_type not in nf4.CODE_BOOKS or state.blocksize not in nf4.BLOCK_SIZES:
        return f"it is quantized as {state.quant_type} in blocks of {state.blocksize}"
    if not torch.equal(state.code.cpu().float(), nf4.code_book(state.quant_type)):
        return f"its code book is not the one of {state.quant_type}"
    if state.nested and not torch.equal(state.state2.code.cpu().float(), nf4.dynamic_map()):
        return "its scales are quantized with another map than bitsandbytes' own"
    return None


def bnb_bytes(param: Any) -> int:
    """Bytes of a bitsandbytes weight's codes and scales; the shared maps are not counted."""
    state = param.quant_state
    parts = [param, state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    return sum(part.numel() * part.element_size() for part in parts)


class ForeignLinear(NamedTuple):
    """A linear that PEFT adapted or bitsandbytes quantized, for the report."""

    name: str
    weight: Tensor
    shape: tuple[int, int]
    rank: dict[str, int]
    lowering: str
    dense_bytes: int
    stored_bytes: int


def foreign_linears(model: nn.Module) -> list[ForeignLinear]:
    """Every such linear of the model, in module order."""
    layers, found = peft_layers(model), []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        name = name.removesuffix(".base_layer")
        layer: Any = layers.get(name)
        if weight is None or module is layer or (layer is None and not is_bnb_weight(weight)):
            continue
        rank = {adapter: int(layer.r[adapter]) for adapter in layer.lora_A} if layer is not None else {}
        found.append(_foreign_linear(name, weight, rank))
    return [linear for linear in found if linear is not None]


def _foreign_linear(name: str, weight: Any, rank: dict[str, int]) -> ForeignLinear | None:
    if is_bnb_weight(weight):
        state = weight.quant_state
        dense = state.shape.numel() * state.dtype.itemsize
        return ForeignLinear(name, weight, tuple(state.shape), rank, "dequantize + GEMM", dense, bnb_bytes(weight))
    if weight.dim() != 2:
        return None
    stored = weight.numel() * weight.element_size()
    return ForeignLinear(name, weight, tuple(weight.shape), rank, "GEMM", stored, stored)
