"""`qlora-compile runs`: the training runs of a folder, from the store that `finetune` keeps beside its output folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import import_torch, print_json, print_table
from .errors import UnknownOptionError

if TYPE_CHECKING:
    from rich.table import Table

    from .runtime.runs.store import RunStore, StoredRun

HELP = """List, show, compare and export training runs.

Example: qlora-compile runs compare run1 run2
"""
runs_app = typer.Typer(name="runs", no_args_is_help=True, help=HELP)

StoreOption = Annotated[Path, typer.Option("--store", help="Folder that holds the runs' folders, or the store's file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")]
NAME = "Folder name of a run, or the beginning of its id."


@runs_app.command("list")
def list_runs(store: StoreOption = Path("."), as_json: JsonOption = False) -> None:
    """List the runs, the first begun first.

    Example: qlora-compile runs list --store experiments
    """
    opened = _open(store)
    rows = [_summary(opened, run) for run in opened.runs()]
    if as_json:
        print_json({"runs": rows})
        return
    table = _table(*rows[0] if rows else ("run",))
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    _print(table)


@runs_app.command("show")
def show_run(
    run: Annotated[str, typer.Argument(help=NAME)], store: StoreOption = Path("."), as_json: JsonOption = False
) -> None:
    """Show one run: settings, evaluations, results.

    Example: qlora-compile runs show run1
    """
    opened = _open(store)
    found = opened.find(run)
    if as_json:
        print_json(vars(found) | {"lines": opened.lines(found.id)})
        return
    from .runtime.runs.compare import flat

    print_table(_summary(opened, found).items())
    print()
    print_table((name, value) for name, value in flat(found.config).items() if value not in ("", {}))
    print()
    print_table(found.versions.items())
    evaluations = opened.lines(found.id, "eval")
    if evaluations:
        columns = ("step", "stage", "perplexity", "loss", "tokens", "documents")
        table = _table(*columns)
        for line in evaluations:
            table.add_row(*(_shown(len(line[c]) if c == "documents" else line[c]) for c in columns))
        _print(table)


@runs_app.command("compare")
def compare_runs(
    a: Annotated[str, typer.Argument(help=NAME)],
    b: Annotated[str, typer.Argument(help=NAME)],
    store: StoreOption = Path("."),
    stage: Annotated[str, typer.Option(help="Evaluation: dense, quantized, training or final.")] = "final",
    as_json: JsonOption = False,
) -> None:
    """Compare two runs: settings that differ, results, and the significance of the difference on held-out documents.

    Example: qlora-compile runs compare run1 run2
    """
    import_torch()
    from .runtime.runs.compare import compare, in_words

    stages = ("dense", "quantized", "training", "final")
    if stage not in stages:
        raise UnknownOptionError(stage, stages, what="evaluation")
    opened = _open(store)
    found = compare(opened, opened.find(a), opened.find(b), stage)
    if as_json:
        print_json(found.to_dict())
        return
    for title, pairs in (("settings that differ", found.settings), ("results", found.results)):
        table = _table(title, found.a, found.b)
        for name, values in pairs.items():
            table.add_row(name, *map(_shown, values))
        _print(table)
    if found.significance is None:
        print(f"no significance of the difference: {found.why_not}")
    else:
        print(in_words(found.significance, found.a, found.b))


@runs_app.command("export")
def export_runs(
    run: Annotated[list[str] | None, typer.Argument(help=f"{NAME} All if none is given.")] = None,
    store: StoreOption = Path("."),
    table: Annotated[str, typer.Option(help="runs, steps, evals or documents.")] = "runs",
    format_: Annotated[str, typer.Option("--format", help="csv, or jsonl: one flat JSON object a line.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """Export runs as a table.

    Example: qlora-compile runs export --table steps --format jsonl --out steps.jsonl
    """
    import_torch()
    from .runtime.formats.atomic import write_file
    from .runtime.runs import tables

    for name, known, what in ((table, tables.TABLES, "table"), (format_, tables.FORMATS, "format")):
        if name not in known:
            raise UnknownOptionError(name, known, what=what)
    opened = _open(store)
    chosen = [opened.find(name) for name in run] if run else opened.runs()
    text = tables.as_text(tables.table(opened, chosen, table), format_)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text)


def _open(place: Path) -> RunStore:
    import_torch()
    from .runtime.runs.store import find_store

    return find_store(place)


def _summary(store: RunStore, run: StoredRun) -> dict[str, Any]:
    results = run.results or {}
    lines = store.lines(run.id, "step")
    perplexity = results.get("perplexity")
    if perplexity is None:
        perplexity = next((line["perplexity"] for line in reversed(store.lines(run.id, "eval"))), None)
    return {
        "run": run.folder,
        "id": run.id,
        "status": run.status,
        "started": run.started,
        "updated": run.updated,
        "model": Path(run.config["model"]).name,
        "r": run.config["qlora"]["r"],
        "steps": run.step,
        "loss": lines[-1]["loss"] if lines else None,
        "perplexity": perplexity,
        "tokens/s": results.get("tokens_per_s"),
    }


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)
