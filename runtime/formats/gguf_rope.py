"""Rotary embeddings in GGUF files, written and read: base and scaling by name, Llama 3.1's as a tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError

FACTORS = "rope_freqs.weight"
_BY_NAME = ("linear", "yarn")


def add_rope(writer: Any, gguf: Any, config: Mapping[str, Any]) -> None:
    """Base and scaling, except what `rope_factors` gives. Raises CheckpointError for one that GGUF has no name for."""
    rope, kind, theta = _rope(config)
    writer.add_rope_freq_base(theta)
    if kind in _BY_NAME:
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind not in ("default", "llama3"):
        raise CheckpointError(f"GGUF has no name for the rotary scaling {kind!r} of this model.")


def rope_factors(config: Mapping[str, Any]) -> Any:
    """What divides each rotary frequency of Llama 3.1, to be stored as a tensor, fp32 [head_dim / 2]; else None.

    transformers `_compute_llama3_parameters`.
    """
    rope, kind, theta = _rope(config)
    if kind != "llama3":
        return None
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    dim = int(config.get("head_dim") or hidden // heads)
    return _llama3_factors(rope, _wavelengths(theta, dim)).float().numpy()


def read_rope(reader: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """`known`, transformers' `rope_parameters` of a file, with the scaling that its reader passes by.

    Where they differ by kind of layer (Gemma 3), what is scaled is full attention; where transformers knows a scaling of
    the architecture itself (Gemma 4), that is it. Raises CheckpointError for one that it has no parameters for.
    """
    by_layer = any(isinstance(value, Mapping) for value in known.values())
    if by_layer and "full_attention" in known:
        full = known["full_attention"]
        return {**known, "full_attention": {**full, **_scaling(reader, full)}}
    return {**known} if by_layer else {**known, **_scaling(reader, known)}


def _scaling(reader: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if (known.get("rope_type") or "default") != "default":
        return {}
    theta = float(known.get("rope_theta", 10000.0))
    fields = {name.partition(".rope.scaling.")[2]: field.contents() for name, field in reader.fields.items()}
    kind = str(fields.get("type", "none"))
    if kind in _BY_NAME:
        rope = {"rope_type": kind, "factor": float(fields["factor"])}
        original = fields.get("original_context_length")
        return rope if original is None else rope | {"original_max_position_embeddings": int(original)}
    if kind != "none":
        raise CheckpointError(f"The file's rotary scaling {kind!r} is none that transformers' models read from it.")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == FACTORS), None)
    return {} if factors is None or (factors == 1).all() else _llama3_parameters(torch.tensor(factors.copy()), theta)


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], str, float]:
    """The rotary embedding: its parameters, its kind and its base."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return rope, str(rope.get("rope_type", rope.get("type", "default"))), theta


def _wavelengths(theta: float, dim: int) -> torch.Tensor:
    return 2 * math.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _llama3_factors(rope: Mapping[str, Any], wavelengths: torch.Tensor) -> torch.Tensor:
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_parameters(factors: torch.Tensor, theta: float) -> dict[str, Any]:
    """The reverse. Only the ratios of original length, low and high show in the factors: low is 1, as in all of Meta's.

    Between the two wavelengths at which the factors begin and end to change, 1 / factor is linear in the frequency; of a
    single one in between high is taken for Meta's, 4.
    """
    wavelengths, factors = _wavelengths(theta, 2 * len(factors)), factors.double()
    factor = round(float(factors.max()), 4)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = torch.nonzero((smooth > 1e-4) & (smooth < 1 - 1e-4)).flatten().tolist()
    if between:
        (x, y), (u, v) = ((1 / float(wavelengths[i]), float(smooth[i])) for i in (between[0], between[-1]))
        slope = (y - v) / (x - u) if x != u else (1 + 3 * y) / (3 * x)
        span = slope * x - y  # low / (high - low)
        rope = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": round(1 + 1 / span, 3), "original_max_position_embeddings": round(slope / span),
        }  # fmt: skip
        # stored in fp32
        if torch.allclose(_llama3_factors(rope, wavelengths), factors, rtol=1e-5, atol=0):
            return rope
    raise CheckpointError(
        f"The file's {FACTORS} are not the factors of Llama 3.1's rotary scaling, which is all that transformers has "
        "parameters for: use the folder that the file was made from."
    )
