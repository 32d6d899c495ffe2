"""`qlora-compile export`: a base model and adapters -> one ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_common import adapter_weights, print_json


def export(
    base: Annotated[Path, typer.Option(help="Hugging Face folder of the base model.")],
    adapter: Annotated[list[str], typer.Option(help="PEFT folder, or DIR=WEIGHT; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, new or empty; or a .gguf file.")],
    base_precision: Annotated[str, typer.Option(help="Fold into 'original' or 'dequantized' weights.")] = "original",
    format: Annotated[str, typer.Option(help="safetensors, nf4 (bitsandbytes'), or gguf.")] = "safetensors",
    dtype: Annotated[
        str | None, typer.Option(help="Of the result (as the base if not given); gguf: bf16, f16, q8_0.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    verify: Annotated[bool, typer.Option(help="Load with transformers and compare with base + adapter.")] = False,
    report: Annotated[bool, typer.Option(help="Print each layer's rounding error.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read a .bin adapter (weights only).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Fold adapters into the base weights, with one rounding, and write what stock transformers loads.

    Example: qlora-compile export --base ./SmolLM2-135M --adapter run/adapter --out merged --verify
    """
    weights = adapter_weights(adapter)
    from .runtime.export import export as run

    done = run(
        base,
        out,
        adapters=weights,
        base_precision=base_precision,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        report=report,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
    )
    if as_json:
        print_json(done.to_dict())
    else:
        done.print()
