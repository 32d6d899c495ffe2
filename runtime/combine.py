"""Several adapters of a model -> one more. `combine_folders` does the same with PEFT folders."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

import torch
from torch import nn

from ..adapter_edits import check_adapter_name
from ..errors import AdapterMismatchError, ConfigError, ModelStateError
from ..modules import prepared_config
from ..tensor import is_finite
from .adapters import adapter_files, install_layers
from .combine_methods import METHODS, SIGN_METHODS, CombineOptions, Term, combine_terms
from .export_sources import unwrap
from .fold_plan import first_few
from .formats.peft_files import LoraLayer, pattern_value

Weight = float | Mapping[str, float]
_NEEDS_EQUAL_RANKS = "linear"
_TAKES_A_RANK = ("svd", "ties", "dare")


@dataclass(frozen=True)
class CombinedLayer:
    """One layer of the result: its rank, and how far it is off, relative to what the method stands for."""

    name: str
    rank: int
    residual: float


@dataclass
class CombineReport:
    """What was combined how. `residual` of a layer is |B'A' - D| / |D| in Frobenius norms, where D is the exact sum (for
    ties and dare: the method's own dense result, which the rank cannot hold); the largest come first."""

    name: str
    method: str
    adapters: dict[str, Weight]
    layers: list[CombinedLayer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def print(self, file: IO[str] | None = None, limit: int = 20) -> None:
        """A summary and a table of the `limit` worst layers."""
        from rich.console import Console
        from rich.table import Table

        console = Console(file=file, soft_wrap=True)
        if not console.is_terminal:
            console.width = 160
        parts = ", ".join(f"{name} {weight}" for name, weight in self.adapters.items())
        ranks = sorted({layer.rank for layer in self.layers})
        text = f"{self.name}: {parts} by {self.method}, {len(self.layers)} layers of rank {ranks[0]} to {ranks[-1]}."
        console.print(text, highlight=False, markup=False)
        table = Table(title="Residual, largest first")
        table.add_column("layer", overflow="fold")
        table.add_column("rank", justify="right")
        table.add_column("relative residual", justify="right")
        for layer in self.layers[:limit]:
            table.add_row(layer.name, str(layer.rank), f"{layer.residual:.2e}")
        console.print(table)
        if len(self.layers) > limit:
            console.print(f"... and {len(self.layers) - limit} layers with less.", highlight=False)


def combine_adapters(
    model: nn.Module,
    adapters: Mapping[str, Weight],
    name: str,
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
    seed: int = 0,
) -> CombineReport:
    """Make adapter `name` on the model out of several of its adapters, with weights; the others stay as they are.

    A weight is a number, or a mapping of module patterns (as `rank_pattern`'s) to numbers: the first that matches
    counts, a module that none matches gets 0. Methods: `combine_methods`. The new adapter counts as 0 until
    `set_adapters` names it: it would be added to those it was made of.

    Raises ConfigError (name, method, rank, density, weights, ranks that differ for "linear"), NoAdapterError (no such
    adapter), ModelStateError (the name is taken). "linear" warns of its cross terms.
    """
    check_adapter_name(name)
    model = unwrap(model)
    if name in adapters:
        raise ModelStateError(
            f"The combined adapter cannot have the name {name!r} of one of its parts: choose another."
        )
    parts = {label: adapter_files(model, label).layers() for label in adapters}
    config = prepared_config(model)
    dtype = config.adapter_dtype if config else torch.float32
    options = checked_options(method, rank, density, majority_sign)
    layers, report = combine_layers(name, parts, dict(adapters), method, options, seed, dtype)
    install_layers(model, name, layers, weight=0.0)
    for text in report.warnings:
        warnings.warn(text, stacklevel=2)
    return report


def checked_options(method: str, rank: int | None, density: float, majority_sign: str) -> CombineOptions:
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if rank is not None and method not in _TAKES_A_RANK:
        raise ConfigError(f"method={method!r} has the rank that it has; rank goes with {', '.join(_TAKES_A_RANK)}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank must be a whole number of 1 or more, got {rank!r}.")
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, got {density!r}.")
    if majority_sign not in SIGN_METHODS:
        raise ConfigError(f"majority_sign must be one of {', '.join(SIGN_METHODS)}, got {majority_sign!r}.")
    return CombineOptions(rank, density, majority_sign)


def combine_layers(
    name: str,
    parts: Mapping[str, Mapping[str, LoraLayer]],
    weights: dict[str, Weight],
    method: str,
    options: CombineOptions,
    seed: int,
    dtype: torch.dtype,
) -> tuple[dict[str, LoraLayer], CombineReport]:
    """Layer by layer. A layer whose parts all weigh 0 is not in the result."""
    if not weights:
        raise ConfigError("There is nothing to combine: name at least one adapter.")
    for label, weight in weights.items():
        _check_weight(label, weight, parts[label])
    report = CombineReport(name, method, weights)
    layers: dict[str, LoraLayer] = {}
    for module in sorted({module for layer in parts.values() for module in layer}):
        found = {label: layers_of[module] for label, layers_of in parts.items() if module in layers_of}
        _check_same_shape(module, found)
        terms = [
            Term(layer.a, layer.b, layer.scaling, w, _generator(seed, module, label))
            for label, layer in found.items()
            if (w := weight_at(weights[label], module))
        ]
        if not terms:
            continue
        if method == _NEEDS_EQUAL_RANKS and len({term.a.shape[-2] for term in terms}) > 1:
            ranks = ", ".join(f"{label}: {layer.rank}" for label, layer in found.items())
            raise ConfigError(f"method='linear' needs equal ranks, at {module} they are {ranks}; use 'cat' or 'svd'.")
        try:
            a, b, residual = _combine_terms(method, terms, options, dtype)
        except torch.linalg.LinAlgError:  # of products that are infinite
            raise _not_finite(module) from None
        check_finite(module, a, b)
        new_rank = a.shape[-2]
        like = next(iter(found.values()))
        layers[module] = LoraLayer(a, b, float(new_rank), 1.0, like.embedding, parameter=like.parameter)
        report.layers.append(CombinedLayer(module, new_rank, residual))
    if not layers:
        raise ConfigError("Nothing is left to combine: all weights are 0, or no adapter has a low-rank layer.")
    report.layers.sort(key=lambda layer: (-layer.residual, layer.name))
    worst = report.layers[0]
    if method == "linear" and len(parts) > 1:
        report.warnings.append(
            f"method='linear' multiplies sums, so each adapter's B meets the others' A: these cross terms put the result "
            f"off the weighted sum by up to {worst.residual:.0%} ({worst.name}); 'cat' is exact."
        )
    return layers, report


def _combine_terms(
    method: str, terms: list[Term], options: CombineOptions, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(A, B, residual) of one layer; of fused experts one after the other, with the largest residual."""
    if terms[0].a.dim() == 2:
        (a, b), residual = combine_terms(method, terms, options, dtype)
        return a, b, residual
    experts = range(terms[0].a.shape[0])
    done = [combine_terms(method, [replace(t, a=t.a[e], b=t.b[e]) for t in terms], options, dtype) for e in experts]
    factors = [torch.stack(parts) for parts in zip(*(pair for pair, _ in done), strict=True)]
    return factors[0], factors[1], max(residual for _, residual in done)


def check_finite(name: str, *tensors: torch.Tensor) -> None:
    """Raises ConfigError: the parts are finite, so it was their weights."""
    if not all(is_finite(tensor) for tensor in tensors if tensor.is_floating_point()):
        raise _not_finite(name)


def _not_finite(name: str) -> ConfigError:
    return ConfigError(f"The weights are too large: the result at {name} is not finite.")


def weight_at(weight: Weight, module: str) -> float:
    """How strongly an adapter counts at a module: its one weight, or that of the first pattern that matches, else 0."""
    return float(pattern_value(weight, module, 0.0)) if isinstance(weight, Mapping) else float(weight)


def _check_weight(label: str, weight: Weight, layers: Iterable[str]) -> None:
    for pattern, value in weight.items() if isinstance(weight, Mapping) else [(None, weight)]:
        where = f" at {pattern!r}" if pattern is not None else ""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"The weight of adapter {label}{where} must be a finite number, got {value!r}.")
        if pattern is None:
            continue
        try:
            hit = any(pattern_value({pattern: True}, module, False) for module in layers)
        except re.error as error:
            raise ConfigError(f"The pattern {pattern!r} of {label} is no regular expression: {error}.") from None
        if not hit:
            raise ConfigError(f"The pattern {pattern!r} matches no layer of the adapter {label}.")


def _check_same_shape(module: str, found: Mapping[str, LoraLayer]) -> None:
    shapes = {label: (*layer.b.shape[:-1], layer.a.shape[-1], layer.embedding) for label, layer in found.items()}
    if len(set(shapes.values())) > 1:
        texts = [f"{list(shape[:-1])} in {label}" for label, shape in shapes.items()]
        raise AdapterMismatchError(f"The adapters are of different models: {module} is {first_few(texts)}.")


def _generator(seed: int, module: str, label: str) -> torch.Generator:
    """One stream per (seed, module, adapter): the order of layers and adapters changes nothing."""
    digest = hashlib.sha256(f"{seed}\0{module}\0{label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
