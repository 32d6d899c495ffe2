"""`qlora-compile export`: a base model and adapters -> one ordinary checkpoint."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import adapter_weights, byte_progress, check_page, import_torch, print_json
from .errors import ConfigError


def export(
    base: Annotated[Path, typer.Option(help="The base model: a Hugging Face folder or a .gguf file.")],
    adapter: Annotated[list[str], typer.Option(help="PEFT folder, or DIR=WEIGHT; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, new or empty; or a .gguf file.")],
    base_precision: Annotated[str, typer.Option(help="Fold into 'original' or 'dequantized' weights.")] = "original",
    format: Annotated[str, typer.Option(help="safetensors, nf4 (bitsandbytes'), or gguf.")] = "safetensors",
    combine: Annotated[
        str | None, typer.Option(help="Fold what `combine` makes of them (svd, ties, ...), not their sum.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="With --combine: as in combine.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the result (as the base if not given); gguf: f32, f16, bf16, q8_0.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    correction_rank: Annotated[
        int | None, typer.Option(help="nf4: also an adapter of this rank for what requantizing lost.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Load with transformers and compare with base + adapter.")] = False,
    report: Annotated[bool, typer.Option(help="Print each layer's rounding error.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report, with each layer's error, to this file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is in OUT.")] = False,
    resume: Annotated[bool, typer.Option(help="Keep what is finished if killed, and go on from it.")] = False,
    allow_pickle: Annotated[bool, typer.Option(help="Read a .bin adapter (weights only).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Fold adapters into the base weights, with one rounding, and write what stock transformers loads.

    Several adapters are added up, each with its weight, unless --combine says otherwise.

    Example: qlora-compile export --base ./SmolLM2-135M --adapter law=0.7 --adapter medicine=0.3 --out merged --verify
    """
    weights = adapter_weights(adapter)
    if html is not None:
        check_page(html, out)
    import_torch()
    from .runtime.export import export as run

    made = one_adapter(weights, combine, rank, allow_pickle)
    with made as adapters, byte_progress("exporting") as progress:
        done = run(
            base,
            out,
            adapters=adapters,
            base_precision=base_precision,
            format=format,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            report=report or html is not None,
            overwrite=overwrite,
            allow_pickle=allow_pickle,
            resume=resume,
            correction_rank=correction_rank,
            progress=progress,
        )
    done.adapters = weights
    if html is not None:
        done.to_html(html)
    if as_json:
        print_json(done.to_dict())
    else:
        done.print()


@contextmanager
def one_adapter(
    weights: Mapping[str, float], method: str | None, rank: int | None, allow_pickle: bool
) -> Iterator[Mapping[str, float]]:
    """The adapters as they are (their exact sum is folded), or combined by `method` into one temporary folder."""
    if method is None:
        if rank is not None:
            raise ConfigError("--rank is for --combine.")
        yield weights
        return
    from .runtime.combine_folders import combine_folders

    with tempfile.TemporaryDirectory(prefix="qlora-compile-") as temporary:
        folder = Path(temporary) / method
        report = combine_folders(weights, folder, method, rank=rank, allow_pickle=allow_pickle)
        for text in report.warnings:
            print("warning:", text, file=sys.stderr)
        yield {str(folder): 1.0}
