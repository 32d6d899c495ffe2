"""`qlora-runs.sqlite`: what every run beside it was, and each line of its metrics; any number of processes may write.

runs    id, folder (its name beside the store), status, step, started, updated, and as JSON: config, versions, data,
        eval_data, results
events  run, position, event ("step", "eval"), step, content: the line of `metrics.jsonl` as JSON
"""

from __future__ import annotations

import datetime
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, RunStoreError, UnknownOptionError

STORE_NAME = "qlora-runs.sqlite"
VERSION = 1
JSON_COLUMNS = ("config", "versions", "data", "eval_data", "results")
SHORTEST_ID = 4
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, folder TEXT NOT NULL, status TEXT NOT NULL, step INTEGER NOT NULL, started TEXT NOT NULL,
    updated TEXT NOT NULL, {", ".join(f"{name} TEXT" for name in JSON_COLUMNS)}
);
CREATE TABLE IF NOT EXISTS events (
    run TEXT NOT NULL REFERENCES runs (id), position INTEGER NOT NULL, event TEXT NOT NULL, step INTEGER NOT NULL,
    content TEXT NOT NULL, PRIMARY KEY (run, position)
) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class StoredRun:
    """One row of `runs`; times are ISO 8601 in UTC, the last five are what `run.json` holds of that name."""

    id: str
    folder: str
    status: str
    step: int
    started: str
    updated: str
    config: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]
    eval_data: dict[str, Any] | None
    results: dict[str, Any] | None


class RunStore:
    """The store at `path`, which `write` makes where there is none. Each call is one transaction.

    Raises RunStoreError where the file is not such a store or cannot be read or written, also where another process
    holds it for longer than `wait_s`.
    """

    def __init__(self, path: Path, wait_s: float = 10.0) -> None:
        self.path = path
        self.wait_s = wait_s

    # --- writing ---------------------------------------------------------------------------------------------------

    def put_run(self, run: dict[str, Any], folder: str, lines: Sequence[dict[str, Any]]) -> None:
        """Add a run, or put this in the place of what is there of it: `run.json`'s content and all lines so far."""
        with self._transaction() as database:
            started = database.execute("SELECT started FROM runs WHERE id = ?", (run["id"],)).fetchone()
            database.execute("DELETE FROM events WHERE run = ?", (run["id"],))
            row = (run["id"], folder, run["status"], run["step"], started[0] if started else now(), now())
            values = (*row, *(_json(run.get(name)) for name in JSON_COLUMNS))
            database.execute(f"INSERT OR REPLACE INTO runs VALUES ({','.join('?' * len(values))})", values)
            _insert(database, run["id"], 0, lines)

    def add_lines(self, run_id: str, position: int, lines: Sequence[dict[str, Any]]) -> None:
        """Lines of the run's metrics, the first of them as number `position`."""
        with self._transaction() as database:
            _insert(database, run_id, position, lines)
            database.execute(
                "UPDATE runs SET updated = ?, step = max(step, ?) WHERE id = ?", (now(), lines[-1]["step"], run_id)
            )

    def end_run(self, run: dict[str, Any]) -> None:
        """The run's last status, step and results."""
        values = (run["status"], run["step"], _json(run.get("results")), now(), run["id"])
        with self._transaction() as database:
            database.execute("UPDATE runs SET status = ?, step = ?, results = ?, updated = ? WHERE id = ?", values)

    def remove_run(self, run_id: str) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM events WHERE run = ?", (run_id,))
            database.execute("DELETE FROM runs WHERE id = ?", (run_id,))

    # --- reading ---------------------------------------------------------------------------------------------------

    def runs(self) -> list[StoredRun]:
        """Every run, the first begun first; of one second, in the order of their rows."""
        with self._reading() as database:
            rows = database.execute("SELECT * FROM runs ORDER BY started, rowid").fetchall()
        return [StoredRun(*row[:6], *(_parsed(self.path, text) for text in row[6:])) for row in rows]

    def find(self, name: str) -> StoredRun:
        """The run of this folder (the newest, where a folder was used again), by its name or path, or whose id begins so.

        Raises UnknownOptionError naming the nearest.
        """
        runs = self.runs()
        folder = Path(name)
        here = folder.name if folder.parent.resolve() == self.path.parent.resolve() else None
        matching = [run for run in runs if run.folder in (name, here)]
        if not matching and len(name) >= SHORTEST_ID:
            matching = [run for run in runs if run.id.startswith(name)]
        if not matching:
            raise UnknownOptionError(name, {run.folder for run in runs}, what="run")
        return matching[-1]

    def lines(self, run_id: str, event: str | None = None) -> list[dict[str, Any]]:
        """The run's metrics, in order; only the lines of one kind with `event`."""
        query = "SELECT content FROM events WHERE run = ? AND (? IS NULL OR event = ?) ORDER BY position"
        with self._reading() as database:
            rows = database.execute(query, (run_id, event, event)).fetchall()
        return [_parsed(self.path, text) for (text,) in rows]

    # --- connections -----------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        is_new = not self.path.exists()
        try:
            with self._writing() as database:
                yield database
        except RunStoreError:
            if is_new and self.path.is_file() and not self.path.stat().st_size:
                self.path.unlink()  # SQLite made it, and could write nothing
            raise

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._errors("written"), closing(self._connect()) as database:
            database.execute("PRAGMA synchronous = NORMAL")
            if self._version(database) == 0:
                database.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}COMMIT;")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.rollback()
                raise
            database.commit()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise ConfigError(
                f"There is no run store {self.path}: `qlora-compile finetune` makes one beside its --out."
            )
        with self._errors("read"), closing(self._connect()) as database:
            if self._version(database) == 0:
                raise sqlite3.DatabaseError("it holds no runs table")
            yield database

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=self.wait_s, isolation_level=None)

    def _version(self, database: sqlite3.Connection) -> int:
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise sqlite3.DatabaseError(f"it is of a newer qlora-compile, version {version}")
        return version

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise RunStoreError(f"The disk is full: the run store {self.path} was not {done}.") from error
            there = os.path.lexists(self.path)
            way_out = "move it away and the next run begins a new one" if there else f"make {self.path.parent} writable"
            raise RunStoreError(
                f"The run store {self.path} cannot be {done} ({error}): {way_out}; each run's own folder still holds its "
                "metrics.jsonl and run.json."
            ) from error


def find_store(place: Path) -> RunStore:
    """A store by its file, or by the folder that it lies in."""
    return RunStore(place / STORE_NAME if place.is_dir() else place)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _insert(database: sqlite3.Connection, run_id: str, position: int, lines: Iterable[dict[str, Any]]) -> None:
    rows = [(run_id, position + i, line["event"], line["step"], _json(line)) for i, line in enumerate(lines)]
    database.executemany("INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?)", rows)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"))


def _parsed(path: Path, text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise RunStoreError(f"The run store {path} is corrupt: {error}; move it away to begin a new one.") from error
