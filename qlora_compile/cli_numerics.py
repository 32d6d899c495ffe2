"""`qlora-compile inspect --numerics`: what quantization costs each layer, each format and, with a text, perplexity."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import CompileReport


def measure_into(
    report: CompileReport, path: Path, bits: float | None, text: Path | None, batch: int, seq_len: int
) -> None:
    """Load the weights and put into the report each layer's error, all formats and, with a text, their perplexities.

    Raises DataError for a text that cannot be read.
    """
    from .numerics import measure, text_perplexities
    from .runtime.data import load_data
    from .runtime.evaluate import evaluate
    from .runtime.model_check import check_model_reads
    from .runtime.models import load_tokenizer, load_weights

    data = None if text is None else load_data(text, load_tokenizer(path), seq_len)
    model = load_weights(path, report.config.compute_dtype, map_experts=data is None)  # a text has them written to
    report.numerics, report.formats = measure(model, report.config, bits)
    if data is not None:
        check_model_reads(model, seq_len, data)
        report.perplexity_dense, report.formats = text_perplexities(
            model, report.config, report.formats, lambda m: evaluate(m, data, batch).perplexity, _tell
        )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def numerics_text(report: CompileReport) -> str:
    """Both tables, and the layers that the budget keeps dense."""
    from rich.console import Console
    from rich.table import Table

    from .numerics import worst

    console = Console(file=(stream := io.StringIO()), width=120)
    table = Table(title="relative error of all target weights together, by format", title_justify="left")
    texts = report.perplexity_dense is not None
    for column in ("type", "block", "double quantization", "bits", "error", *(["perplexity"] if texts else [])):
        table.add_column(column)
    for v in report.formats:
        row = (v.quant_type, str(v.block_size), "yes" if v.double_quant else "no", f"{v.bits:.3f}", f"{v.error:.5f}")
        table.add_row(*row, *([] if v.perplexity is None else [f"{v.perplexity:.3f}"]))
    console.print(table)
    if texts:
        console.print(f"perplexity of the dense model: {report.perplexity_dense:.3f}")
    layers = Table(title=f"worst layers in {report.config.quant_type}/{report.config.block_size}", title_justify="left")
    for column in ("layer", "error"):
        layers.add_column(column)
    for each in worst(report.numerics):
        layers.add_row(each.name, f"{each.error:.5f}")
    console.print(layers)
    dense = [each.name for each in report.numerics if each.dense]
    if dense:
        console.print(f"keep dense within the budget: {', '.join(dense)}", soft_wrap=True)
    return stream.getvalue()
