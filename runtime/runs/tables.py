"""The store as flat tables for spreadsheets and data frames: each row has the same columns, each column one type."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from .compare import flat
from .store import RunStore, StoredRun

TABLES = ("runs", "steps", "evals", "documents")
FORMATS = ("csv", "jsonl")
Row = dict[str, Any]


def table(store: RunStore, runs: Iterable[StoredRun], name: str) -> list[Row]:
    """The rows of one of TABLES; what a run does not have is None."""
    rows = [row for run in runs for row in _rows(store, run, name)]
    columns = dict.fromkeys(column for row in rows for column in row)
    return _one_type([{column: row.get(column) for column in columns} for row in rows], list(columns))


def _rows(store: RunStore, run: StoredRun, name: str) -> list[Row]:
    key = {"run": run.folder, "id": run.id}
    if name == "runs":
        parts = {"config": run.config, "data": run.data, "eval_data": run.eval_data or {}, "results": run.results or {}}
        parts["results"] = {k: v for k, v in parts["results"].items() if k != "losses"}
        state = {"status": run.status, "step": run.step, "started": run.started, "updated": run.updated}
        return [key | state | flat(parts) | flat({"version": run.versions})]
    lines = store.lines(run.id, "step" if name == "steps" else "eval")
    if name == "documents":
        return [
            key
            | {"step": line["step"], "stage": line["stage"], "document": document, "loss_sum": loss, "tokens": tokens}
            for line in lines
            for document, loss, tokens in line["documents"]
        ]
    return [key | {name: value for name, value in line.items() if name not in ("event", "documents")} for line in lines]


def _one_type(rows: list[Row], columns: Sequence[str]) -> list[Row]:
    """Whole numbers as fractions where both occur, text where types are mixed: Parquet has one type a column."""
    for column in columns:
        types = {type(row[column]) for row in rows if row[column] is not None}
        if len(types) > 1:
            as_one = float if types == {int, float} else str
            for row in rows:
                row[column] = None if row[column] is None else as_one(row[column])
    return rows


def as_text(rows: Sequence[Row], format_: str) -> str:
    """CSV with a header, or one JSON object a line (what pandas, polars and DuckDB read and turn into Parquet)."""
    if format_ == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
