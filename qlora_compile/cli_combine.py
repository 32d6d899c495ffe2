"""`qlora-compile combine`: several adapters -> one adapter."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import adapter_weights, import_torch, print_json
from .errors import ConfigError


def combine(
    adapter: Annotated[list[str], typer.Option(help="PEFT folder, or DIR=WEIGHT; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the combined adapter; new or empty.")],
    method: Annotated[str, typer.Option(help="cat, svd, linear, sequential, ties or dare.")] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="svd, ties, dare: rank of the result (each layer's largest).")
    ] = None,
    module_weight: Annotated[
        list[str] | None, typer.Option(help="DIR:PATTERN=WEIGHT, before DIR's own weight; repeatable.")
    ] = None,
    density: Annotated[float, typer.Option(help="ties, dare: fraction of each adapter's values to keep.")] = 0.5,
    majority_sign: Annotated[str, typer.Option(help="ties: elect signs by 'total' or 'frequency'.")] = "total",
    seed: Annotated[int, typer.Option(help="dare: what it drops.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read a .bin adapter (weights only).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Combine adapters with weights into one adapter folder; no base model is needed.

    cat is exact, its rank is the sum of the ranks; the report says how far the others are off, layer by layer.

    Example: qlora-compile combine --adapter law=0.7 --adapter medicine=0.3 --method svd --rank 16 --out both
    """
    weights = module_weights(adapter_weights(adapter), module_weight or [])
    import_torch()
    from .runtime.combine_folders import combine_folders

    report = combine_folders(
        weights,
        out,
        method,
        rank=rank,
        density=density,
        majority_sign=majority_sign,
        seed=seed,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    for text in report.warnings:
        print("warning:", text, file=sys.stderr)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print()


def module_weights(weights: Mapping[str, float], texts: list[str]) -> dict[str, float | Mapping[str, float]]:
    """`{"a": 0.7}` and `["a:mlp.*=0.2"]` -> `{"a": {"mlp.*": 0.2, ".*": 0.7}}`: the first pattern that matches counts."""
    out: dict[str, float | Mapping[str, float]] = dict(weights)
    patterns: dict[str, dict[str, float]] = {}
    for text in texts:
        rest, _, number = text.rpartition("=")
        owner = max((name for name in weights if rest.startswith(f"{name}:")), key=len, default=None)
        if owner is None or rest == f"{owner}:":
            raise ConfigError(f"--module-weight takes DIR:PATTERN=WEIGHT with a DIR of --adapter, got {text!r}.")
        try:
            patterns.setdefault(owner, {})[rest[len(owner) + 1 :]] = float(number)
        except ValueError:
            raise ConfigError(f"--module-weight takes DIR:PATTERN=WEIGHT, got {text!r}.") from None
    for name, own in patterns.items():
        out[name] = {**own, ".*": weights[name]}
    return out
