"""`qlora-compile convert`: a dense checkpoint <-> a 4-bit one, with no adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_common import byte_progress, import_torch, print_json
from .errors import ConfigError, UnknownOptionError

FORMATS = {"nf4": "nf4", "dense": "safetensors", "gguf": "gguf"}


def convert(
    model: Annotated[Path, typer.Option(help="Folder (dense, or bitsandbytes' 4 bits) or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, new or empty; or a .gguf file.")],
    to: Annotated[str, typer.Option(help="nf4 (bitsandbytes' 4-bit folder), dense or gguf.")],
    quant_type: Annotated[str | None, typer.Option(help="nf4: nf4 (if not given) or fp4.")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="nf4: weights per scale, 32 to 4096 (64 if not given).")
    ] = None,
    double_quant: Annotated[bool | None, typer.Option(help="nf4: quantize the scales too (yes if not given).")] = None,
    dtype: Annotated[str | None, typer.Option(help="As in export.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    report: Annotated[bool, typer.Option(help="Print each layer's rounding error.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Convert a checkpoint between 16 bits, bitsandbytes' 4 bits and GGUF, one tensor in memory at a time.

    From 4 bits to dense, the values stay those of the 4-bit model.

    Example: qlora-compile convert --model ./SmolLM2-135M --to nf4 --out SmolLM2-135M-nf4
    """
    if to not in FORMATS:
        raise UnknownOptionError(to, FORMATS, what="format")
    given = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    quant = {name: value for name, value in given.items() if value is not None}
    if quant and to != "nf4":
        raise ConfigError(f"--{next(iter(quant)).replace('_', '-')} is for --to nf4, and --to is {to}.")
    import_torch()
    from .runtime.export import export
    from .runtime.quantized_source import is_quantized_folder

    with byte_progress("converting") as progress:
        done = export(
            model,
            out,
            base_precision="dequantized" if is_quantized_folder(model) else "original",
            format=FORMATS[to],
            quant=quant if to == "nf4" else None,
            dtype=dtype,
            max_shard_size=max_shard_size,
            report=report,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(done.to_dict())
    else:
        done.print()
