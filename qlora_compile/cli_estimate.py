"""`qlora-compile estimate`: what a training step would need and whether it fits, from a configuration alone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_common import import_torch, print_json, waiting
from .cli_options import (
    AsJson,
    Batch,
    BlockSize,
    DoubleQuant,
    ModelOption,
    ModelPath,
    Rank,
    SeqLen,
    Targets,
    model_argument,
    quantization,
)

if TYPE_CHECKING:
    from .estimate import Estimate


def estimate(
    path: ModelPath = None,
    model: ModelOption = None,
    device_memory: Annotated[str | None, typer.Option(help="Does it fit? 24GiB, 80GB.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="GPU by name, e.g. RTX-4090, A100-80GB, H100-SXM: sets the memory, prints a lower bound of the step's time."
        ),
    ] = None,
    batch: Batch = 1,
    seq_len: SeqLen = 512,
    r: Rank = 16,
    target_modules: Targets = "all-linear",
    optimizer: Annotated[
        str, typer.Option(help="adamw, paged_adamw, paged_adamw8bit, paged_lion, lion or sgd.")
    ] = "adamw",
    optimizer_budget: Annotated[str | None, typer.Option(help="As in finetune.")] = None,
    activation_budget: Annotated[float, typer.Option(help="Fraction of saved activations to keep.")] = 1.0,
    keep_logits: Annotated[bool, typer.Option(help="Hold all logits instead of chunks of them in the loss.")] = False,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory of fine-tuning before running it; no weight is read.

    Example: qlora-compile estimate ./Llama-3.1-8B --device-memory 24GiB --batch 4 --seq-len 2048
    """
    import_torch()
    from .estimate import Estimator, devices, find_device, parse_bytes
    from .runtime.models import empty_model

    given = model_argument(path, model)
    memory = None if device_memory is None else parse_bytes(device_memory)
    name = None if device is None else find_device(device)
    if name is not None and memory is None:
        memory = int(devices()[name]["memory_bytes"])
    more = {"activation_budget": activation_budget, "keep_logits": keep_logits}
    config = quantization(r, target_modules, None, block_size, double_quant, **more)
    budget = None if optimizer_budget is None else parse_bytes(optimizer_budget)
    model_ = empty_model(given, config.compute_dtype)
    kind = None if name is None else "cuda"  # all named devices are GPUs
    estimator = Estimator(model_, config, optimizer.replace("-", "_"), budget, kind)
    with waiting("tracing a training step"):
        found = estimator(batch, seq_len, memory, name)
    if as_json:
        print_json(found.to_dict())
    else:
        print_estimate(found)


def print_estimate(found: Estimate) -> None:
    """Peaks by phase and kind, the verdict, what would fit, and the table over batch and sequence length."""
    from rich.console import Console
    from rich.table import Table

    from .stage_graph import human_bytes, human_count

    console = Console(width=None if sys.stdout.isatty() else 160)
    kinds = list(dict.fromkeys(kind for peak in found.peaks.values() for kind in peak.by_kind))
    table = Table(title=f"{found.model}, batch {found.batch} × {found.seq_len} tokens: peaks", title_justify="left")
    for column in ("phase", *kinds, "together"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, peak in found.peaks.items():
        parts = [human_bytes(peak.by_kind[kind]) if kind in peak.by_kind else "-" for kind in kinds]
        table.add_row(phase, *parts, f"[bold]{human_bytes(peak.bytes)}[/bold]")
    console.print(table)
    console.print(f"peak: {human_bytes(found.peak)}; a driver's own memory (0.5 to 1 GB on CUDA) comes on top")
    if found.fitted:
        traced = ", ".join(map(str, found.fitted))
        console.print(
            f"approximate: what this model computes changes with the length, fitted to traces of {traced} tokens"
        )
    if found.host_bytes:
        console.print(f"paged to the host: {human_bytes(found.host_bytes)}")
    console.print(f"a step: {human_count(found.flops)}FLOP", highlight=False)
    if found.roofline_s is not None:
        console.print(f"on {found.device}: no step is faster than {found.roofline_s * 1e3:,.1f} ms")
    for line in verdict(found):
        console.print(line)
    grid = Table(title="peak by batch and sequence length", title_justify="left")
    grid.add_column("batch", justify="right")
    lengths = list(next(iter(found.table.values())))
    for seq in lengths:
        grid.add_column(str(seq), justify="right")
    for batch, row in found.table.items():
        grid.add_row(str(batch), *(_cell(row[seq], found.device_memory) for seq in lengths))
    console.print(grid)


def _cell(amount: int, memory: int | None) -> str:
    from .stage_graph import human_bytes

    color = "green" if memory is not None and amount <= memory else "red" if memory is not None else ""
    return f"[{color}]{human_bytes(amount)}[/{color}]" if color else human_bytes(amount)


def verdict(found: Estimate) -> list[str]:
    """Whether it fits, and what to change so that it does."""
    from .stage_graph import human_bytes

    if found.device_memory is None:
        return []
    room = f"{human_bytes(found.device_memory)}"
    if found.fits:
        free = human_bytes(found.device_memory - found.peak)
        lines = [f"fits in {room} with {free} to spare"]
    else:
        lines = [f"does not fit in {room}: {human_bytes(found.peak - found.device_memory)} too much"]
        for way in found.ways:
            note = "; recomputes, approximate" if way.approximate else ""
            lines.append(f"fits with {way.options} ({human_bytes(way.peak)}{note})")
    at_batch = f"largest batch at {found.seq_len} tokens: {found.largest_batch}"
    lines.append(at_batch if found.largest_batch else f"no batch of {found.seq_len} tokens fits")
    at_seq = f"longest sequence at batch {found.batch}: {found.longest_seq} tokens"
    lines.append(at_seq if found.longest_seq else f"no sequence fits at batch {found.batch}: take a smaller model")
    return lines
