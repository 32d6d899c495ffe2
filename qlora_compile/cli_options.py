"""Options that `inspect` and `estimate` share: what is traced, and with which adapters and format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import modules_option
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import QLoRAConfig

ModelPath = Annotated[Path | None, typer.Argument(help="Hugging Face folder, config.json or GGUF file.")]
ModelOption = Annotated[Path | None, typer.Option(help="The same, given as an option.")]
Batch = Annotated[int, typer.Option(help="Sequences in a step.")]
SeqLen = Annotated[int, typer.Option(help="Tokens in each.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapters; 0: quantize only.")]
Targets = Annotated[str, typer.Option(help="As in finetune.")]
BlockSize = Annotated[int, typer.Option(help="Weights per scale, 32 to 4096.")]
DoubleQuant = Annotated[bool, typer.Option(help="Quantize the scales too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")]


def model_argument(path: Path | None, model: Path | None) -> Path:
    """The model, given as an argument or as --model. Raises ConfigError for none or both."""
    if (path is None) == (model is None):
        raise ConfigError("Name one model: a folder, a config.json or a .gguf file.")
    given = path if path is not None else model
    assert given is not None
    return given


def quantization(
    r: int, target_modules: str, exclude_modules: str | None, block_size: int, double_quant: bool, **more: Any
) -> QLoRAConfig:
    """The configuration that the shared options describe."""
    from .config import QLoRAConfig

    return QLoRAConfig(
        r=r,
        target_modules=modules_option(target_modules),
        exclude_modules=None if exclude_modules is None else modules_option(exclude_modules),
        block_size=block_size,
        double_quant=double_quant,
        **more,
    )
