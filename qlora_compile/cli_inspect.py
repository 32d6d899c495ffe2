"""`qlora-compile inspect`: run the compiler on a model's configuration and show what it does.

No weight is loaded, except with `--numerics` (cli_numerics.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import import_torch, waiting
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
from .counts import check_counts
from .errors import ConfigError, UnknownOptionError

if TYPE_CHECKING:
    from .page_plan import PlannedOptimizer
    from .report import CompileReport

FORMATS = ("text", "json", "graphml", "dot", "svg", "python", "html")


def inspect(
    path: ModelPath = None,
    model: ModelOption = None,
    batch: Batch = 1,
    seq_len: SeqLen = 512,
    stage: Annotated[str | None, typer.Option(help="One stage: input, a pass's name, forward or backward.")] = None,
    diff: Annotated[tuple[str, str] | None, typer.Option(help="What changed from stage A to stage B.")] = None,
    module: Annotated[str | None, typer.Option(help="Only these modules: a name, part of it, or a pattern.")] = None,
    format_: Annotated[str, typer.Option("--format", help=", ".join(FORMATS) + ".")] = "text",
    run: Annotated[list[Path] | None, typer.Option(help="Folder of a finetune run, for html; repeatable.")] = None,
    export: Annotated[list[Path] | None, typer.Option(help="File of export --report --json, for html.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
    r: Rank = 16,
    target_modules: Targets = "all-linear",
    exclude_modules: Annotated[str | None, typer.Option(help="As in finetune.")] = None,
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = True,
    optimizer: Annotated[str | None, typer.Option(help="Plan the pages of paged_adamw, paged_adamw8bit, ...")] = None,
    optimizer_budget: Annotated[str | None, typer.Option(help="Its bytes on the device, as 2GiB.")] = None,
    step_in_backward: Annotated[bool, typer.Option(help="It updates inside the backward pass.")] = False,
    numerics: Annotated[bool, typer.Option(help="Load the weights; measure each layer's quantization error.")] = False,
    bits: Annotated[
        float | None,
        typer.Option(help="With --numerics: which layers should stay dense within this many bits a weight."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --numerics: perplexity of each format on this text.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Print the source of this generated kernel.")] = None,
    autotune: Annotated[bool, typer.Option(help="Measure all kernels for the model's shapes on this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the compiler does to a model: passes, each linear layer, bytes, the graph at every stage.

    No weight is read, except with --numerics: a configuration is enough, and a model of any size fits.

    Example: qlora-compile inspect ./SmolLM2-135M --diff input group_linears
    """
    options = dict(locals())
    given = model_argument(path, model)
    format_ = _format(options)
    check_counts(batch, seq_len)
    import_torch()
    _check_stages([name for name in (stage, *(diff or ())) if name is not None])
    planned = _planned(optimizer, optimizer_budget, step_in_backward)
    config = quantization(
        r, target_modules, exclude_modules, block_size, double_quant, quant_type=quant_type, autotune=autotune
    )
    with waiting("tracing a training step"):
        report = config_report(given, config, batch, seq_len, planned)
    if numerics:
        from .cli_numerics import measure_into

        with waiting("measuring quantization errors"):
            measure_into(report, given, bits, text, batch, seq_len)
    if format_ == "html" and out is not None:
        report.to_html(out, run or (), export or ())
    elif kernel is not None:
        _deliver(_kernel_source(report, kernel), out)
    elif numerics and format_ == "text":
        from .cli_numerics import numerics_text

        _deliver(numerics_text(report), out)
    else:
        wide = out is not None or not sys.stdout.isatty()
        _deliver(rendered(report, format_, stage, diff, module, wide=wide), out)


def _format(options: dict[str, Any]) -> str:
    """The command's parameters by name -> the format. Raises ConfigError for options that do not go together."""
    asked, as_json = options["format_"], options["as_json"]
    given = [f"--{name}" for name, value in options.items() if value not in (None, []) and value is not False]
    if asked not in FORMATS:
        raise UnknownOptionError(asked, FORMATS, what="format")
    selected = [option for option in given if option in ("--stage", "--diff", "--module")]
    whole = "--numerics" if "--numerics" in given else "--format html" if asked == "html" else ""
    if as_json and (asked not in ("text", "json") or selected or "--kernel" in given):
        raise ConfigError("--json is the whole report as one JSON object: leave --format and what selects from it out.")
    if "--kernel" in given and (selected or whole or asked != "text"):
        raise ConfigError("--kernel prints one source as it is: leave --format, --numerics and other selections out.")
    if whole and selected:
        raise ConfigError(f"{whole} is about the whole model: leave {' and '.join(selected)} out.")
    for option in ("--bits", "--text"):
        if option in given and "--numerics" not in given:
            raise ConfigError(f"{option} is for --numerics.")
    if asked != "html" and ("--run" in given or "--export" in given):
        raise ConfigError("--run and --export are for --format html.")
    if asked == "html" and "--out" not in given:
        raise ConfigError("--format html needs --out FILE.")
    return "json" if as_json else asked


def _check_stages(names: list[str]) -> None:
    """Before anything is traced. Raises UnknownOptionError naming the nearest stage."""
    if not names:
        return
    from .passes import PIPELINE

    known = ("input", *(rewrite.__name__ for rewrite in PIPELINE), "forward", "backward")
    for name in names:
        if name not in known:
            raise UnknownOptionError(name, known, what="stage")


def _planned(optimizer: str | None, budget: str | None, step_in_backward: bool) -> PlannedOptimizer | None:
    """The paged optimizer to plan for. Raises ConfigError where its options stand without it."""
    from .page_plan import PlannedOptimizer
    from .runtime.memory import parse_bytes

    if optimizer is None:
        if budget is not None or step_in_backward:
            raise ConfigError("--optimizer-budget and --step-in-backward are for --optimizer paged_adamw.")
        return None
    bytes_ = None if budget is None else parse_bytes(budget)
    return PlannedOptimizer(optimizer.replace("-", "_"), bytes_, step_in_backward)


def config_report(
    path: Path, config: Any, batch: int, seq_len: int, optimizer: PlannedOptimizer | None = None
) -> CompileReport:
    """Trace one training step of the model that `path` describes, on the meta device."""
    import torch

    from .runtime.models import empty_model
    from .tracing import trace

    model = empty_model(path, config.compute_dtype).train()
    tokens = torch.zeros(batch, seq_len, dtype=torch.long, device="meta")
    return trace(model, {"input_ids": tokens, "labels": tokens}, config, optimizer=optimizer)


def rendered(
    report: CompileReport,
    format_: str,
    stage: str | None,
    diff: tuple[str, str] | None,
    module: str | None,
    *,
    wide: bool,
) -> str:
    """The text to print or to write. Raises UnknownOptionError for a stage or module that there is not."""
    from .graph_files import GRAPH_FORMATS
    from .report_text import select_modules
    from .stage_graph import to_networkx

    if format_ == "text":
        return _text(report, stage, diff, module, wide)
    if diff is not None:
        raise ConfigError("--diff is text: leave --format out.")
    name = stage or next(reversed([s for s in report.stages if s not in ("forward", "backward")]))
    records = select_modules(report.stage(name), module)
    if format_ == "python":
        if module is not None:
            raise ConfigError("--format python gives a whole stage: leave --module out.")
        return report.code[name]
    if format_ == "json" and stage is None and module is None:
        import json

        return json.dumps(report.to_dict(), indent=2, sort_keys=True, default=str) + "\n"
    return GRAPH_FORMATS[format_](to_networkx(name, records))


def _text(
    report: CompileReport, stage: str | None, diff: tuple[str, str] | None, module: str | None, wide: bool
) -> str:
    import io

    from rich.console import Console

    from .report_text import print_diff, print_report, select_modules, stage_tree

    stream = io.StringIO()
    console = Console(file=stream, width=140) if wide else Console(file=stream, force_terminal=True)
    if diff is not None:
        a, b = (report.stage(name) for name in diff)
        if module is not None:
            a, b = select_modules(a, module), select_modules(b, module)
        print_diff(diff, a, b, console)
    elif stage is not None:
        console.print(stage_tree(stage, select_modules(report.stage(stage), module)))
    else:
        print_report(report if module is None else _only(report, module), console)
    return stream.getvalue()


def _only(report: CompileReport, pattern: str) -> CompileReport:
    """The linears that a pattern names, and their kernels. Raises UnknownOptionError naming the nearest."""
    import dataclasses

    from .report_text import names_module, unknown_module

    linears = [linear for linear in report.linears if names_module(pattern, linear.name)]
    if not linears:
        raise unknown_module(pattern, [linear.name for linear in report.linears])
    choices = []
    for choice in report.choices:
        modules = tuple(name for name in choice.modules if names_module(pattern, name))
        choices += [dataclasses.replace(choice, modules=modules)] if modules else []
    return dataclasses.replace(report, passes=[], memory={}, plan=None, linears=linears, choices=choices)


def _kernel_source(report: CompileReport, name: str) -> str:
    """Several kernels may stand in one file. Raises UnknownOptionError naming the nearest that this machine generates."""
    from .kernel_report import articles

    texts = report.kernels
    known = {part: texts[shown_as] for part, shown_as in articles(report).items()} | texts
    if name not in known:
        raise UnknownOptionError(name, known, what="kernel")
    return known[name]


def _deliver(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    from .runtime.formats.atomic import write_file

    write_file(out, text)
