"""What quantization does to each layer's weight: relative error by format, and which layers a budget of bits keeps dense."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .config import QLoRAConfig
from .errors import ConfigError
from .report import LayerError, Variant
from .state import ModelEdits, expert_entries, linear_entries
from .tensor import QuantizedTensor, quantize_4bit

DENSE_BITS = 16


def target_weights(model: nn.Module, config: QLoRAConfig) -> dict[str, Tensor]:
    """The weights that the configuration quantizes, by name. Raises NoTargetError if there are none."""
    from .preparation import require_targets

    edits = ModelEdits(model, config)
    found = [entry for entry, _ in [*linear_entries(edits), *expert_entries(edits)]]
    targets = [entry for entry in found if edits.decline_reason(entry) is None]
    require_targets(targets, found, edits)
    return {entry.name: entry.param.detach() for entry in targets}


def _quantized(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> QuantizedTensor:
    experts = weight.dim() == 3  # blocks end with each expert
    return quantize_4bit(
        weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant, per_expert=experts
    )


def squared_error(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> tuple[float, float, int]:
    """(sum of (w - its 4-bit value)^2, sum of w^2, stored bytes); sums in fp64."""
    quantized = _quantized(weight, quant_type, block_size, double_quant)
    exact = weight.double()
    difference = quantized.dequantize().double().sub_(exact)
    return float(difference.square_().sum()), float(exact.square_().sum()), quantized.stored_bytes


def layer_errors(model: nn.Module, config: QLoRAConfig, bits_budget: float | None = None) -> list[LayerError]:
    """The relative error of each target in the configuration's format, in model order; with a budget, who stays dense.

    Raises ConfigError for a budget that even the format alone exceeds.
    """
    errors, squared, stored = [], [], []
    for name, weight in target_weights(model, config).items():
        error, norm, nbytes = squared_error(weight, config.quant_type, config.block_size, config.double_quant)
        errors.append(LayerError(name, (error / norm) ** 0.5 if norm else 0.0, weight.numel()))
        squared.append(error)
        stored.append(nbytes * 8)
    if bits_budget is None:
        return errors
    dense = dense_layers(squared, stored, [each.weights for each in errors], bits_budget)
    return [dataclasses.replace(each, dense=i in dense) for i, each in enumerate(errors)]


def dense_layers(squared: Sequence[float], bits: Sequence[int], weights: Sequence[int], budget: float) -> set[int]:
    """Which layers to keep dense, so that all take at most `budget` bits a weight: the most squared error per bit first.

    A greedy knapsack: a layer that no longer fits is passed over for smaller ones.
    """
    room = budget * sum(weights) - sum(bits)
    if room < 0:
        least = sum(bits) / max(sum(weights), 1)
        raise ConfigError(f"A budget of {budget:g} bits a weight is below what the format alone takes, {least:.3f}.")
    cost = [DENSE_BITS * n - b for n, b in zip(weights, bits, strict=True)]
    chosen: set[int] = set()
    for index in sorted(range(len(cost)), key=lambda i: -squared[i] / max(cost[i], 1)):
        if cost[index] <= room:
            chosen.add(index)
            room -= cost[index]
    return chosen


def compare_formats(
    weights: Iterable[Tensor],
    quant_types: Sequence[str] = ("nf4", "fp4"),
    block_sizes: Sequence[int] = (32, 64, 128, 256),
    double_quant: Sequence[bool] = (True, False),
) -> list[Variant]:
    """Every combination over all the weights together, best first."""
    kinds = [(q, b, d) for q in quant_types for b in block_sizes for d in double_quant]
    sums = {kind: [0.0, 0.0, 0, 0] for kind in kinds}
    for weight in weights:
        for kind, total in sums.items():
            error, norm, nbytes = squared_error(weight, *kind)
            for i, more in enumerate((error, norm, nbytes, weight.numel())):
                total[i] += more
    found = [Variant(*kind, t[2] * 8 / max(t[3], 1), (t[0] / t[1]) ** 0.5 if t[1] else 0.0) for kind, t in sums.items()]
    return sorted(found, key=lambda variant: variant.error)


def worst(errors: Iterable[LayerError], count: int = 10) -> list[LayerError]:
    """The layers that lose the most, worst first."""
    return heapq.nlargest(count, errors, key=lambda each: each.error)


def with_dense_layers(model: nn.Module, config: QLoRAConfig, bits_budget: float) -> QLoRAConfig:
    """The configuration whose `dense_modules` are also the layers that the budget keeps dense.

    Raises ConfigError for a budget that even the format alone exceeds.
    """
    with torch.no_grad():
        dense = [layer.name for layer in layer_errors(model, config, bits_budget) if layer.dense]
        dense += [name for name in target_weights(model, config) if config.stays_dense(name)]
    return dataclasses.replace(config, dense_modules=tuple(dict.fromkeys(dense)))


@contextlib.contextmanager
def quantized_in_place(weights: Mapping[str, Tensor], variant: Variant) -> Iterator[None]:
    """Every weight has the values of its 4-bit form inside the block, and its own again after it; takes a copy of all."""
    kept = {name: weight.clone() for name, weight in weights.items()}
    try:
        for weight in weights.values():
            quantized = _quantized(weight, variant.quant_type, variant.block_size, variant.double_quant)
            weight.copy_(quantized.dequantize())
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(kept[name])


def text_perplexities(
    model: nn.Module,
    config: QLoRAConfig,
    variants: Iterable[Variant],
    perplexity: Callable[[nn.Module], float],
    told: Callable[[str], None] = lambda line: None,
) -> tuple[float, list[Variant]]:
    """(perplexity of the dense model, each format with its own); `perplexity` measures a model, `told` hears of each."""
    weights = target_weights(model, config)
    found = []
    with torch.no_grad():
        dense = perplexity(model)
        told(f"dense: perplexity {dense:.3f}")
        for variant in variants:
            with quantized_in_place(weights, variant):
                found.append(dataclasses.replace(variant, perplexity=perplexity(model)))
            double = ", double quantization" if variant.double_quant else ""
            told(f"{variant.quant_type}, blocks of {variant.block_size}{double}: perplexity {found[-1].perplexity:.3f}")
    return dense, found


def measure(model: nn.Module, config: QLoRAConfig, bits_budget: float | None) -> tuple[list[LayerError], list[Variant]]:
    """Each layer's error and the comparison of formats."""
    with torch.no_grad():
        errors = layer_errors(model, config, bits_budget)
        return errors, compare_formats(target_weights(model, config).values())
