"""`qlora-compile inspect`: run the compiler on a model, train nothing, and print its report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_common import modules_option, print_json

TOKENS = (2, 16)  # batch and length of the input that the model is traced with


def inspect(
    model: Annotated[Path, typer.Option(help="Hugging Face folder, or a GGUF file.")],
    r: Annotated[int, typer.Option(help="Rank of the adapters; 0: quantize only.")] = 16,
    target_modules: Annotated[str, typer.Option(help="As in finetune.")] = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="As in finetune.")] = None,
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Weights per scale, 32 to 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what the compiler does to a model: passes, each linear layer, bytes before and after.

    The model is loaded and quantized in memory, so it needs room for its weights; nothing is written.

    Example: qlora-compile inspect --model ./SmolLM2-135M --target-modules q_proj,v_proj
    """
    from .config import QLoRAConfig

    config = QLoRAConfig(
        r=r,
        target_modules=modules_option(target_modules),
        exclude_modules=None if exclude_modules is None else modules_option(exclude_modules),
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        lowering="eager",  # the report is about the passes; what Inductor makes of the result is not in it
    )
    report = compile_report(model, config)
    if as_json:
        print_json(report.to_dict())
    else:
        report.print(None if sys.stdout.isatty() else sys.stdout)  # a pipe is given long lines: no name is broken


def compile_report(path: Path, config: Any) -> Any:
    """Load the model, call it once through the backend, and explain it."""
    import torch

    from .report import explain
    from .runtime.models import load_weights

    model = load_weights(path, config.compute_dtype)
    model.config.use_cache = False
    model.compile(backend="qlora", options=config.to_dict())
    tokens = torch.zeros(TOKENS, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=tokens, labels=tokens)
    return explain(model)
