"""A run -> the store beside its folder, in batches, so that training waits neither for a disk nor for other processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import RunStoreError
from .sinks import Notice
from .store import STORE_NAME, RunStore

FLUSH_EVERY_S = 1.0
# For a store that another process writes: at a run's ends, and in its middle.
WAIT_S, SHORT_WAIT_S = 5.0, 0.05


class StoreSink:
    """Appends a run's lines to the store in the parent of its folder. A store that fails is left alone with a notice.

    What a killed run had not handed over yet is in its `metrics.jsonl`, from which `--resume` fills the store again.
    """

    def __init__(self, out: Path, notice: Notice) -> None:
        out = out.resolve()
        self.folder = out.name
        self.store = RunStore(out.parent / STORE_NAME, WAIT_S)
        self.notice = notice
        self._run_id = ""
        self._position = 0
        self._waiting: list[dict[str, Any]] = []
        self._last_flush = 0.0

    def started(self, run: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
        try:
            self.store.put_run(run, self.folder, earlier)
        except RunStoreError as error:
            self.notice(f"this run is not added to the run store: {error}")
            return
        self._run_id, self._position = run["id"], len(earlier)
        self.store.wait_s = SHORT_WAIT_S

    def line(self, line: dict[str, Any]) -> None:
        if not self._run_id:
            return
        self._waiting.append(line)
        if time.monotonic() - self._last_flush >= FLUSH_EVERY_S:
            self._flush()

    def ended(self, run: dict[str, Any]) -> None:
        self.store.wait_s = WAIT_S
        try:
            if self._run_id and self._waiting:
                self._hand_over()
            if self._run_id:
                self.store.end_run(run)
        except RunStoreError as error:
            self.notice(f"the end of this run is not in the run store: {error}")

    def forget(self) -> None:
        try:
            if self._run_id:
                self.store.remove_run(self._run_id)
        except RunStoreError as error:
            self.notice(str(error))

    def _flush(self) -> None:
        """What cannot be handed over now, because another process writes, waits for the next time."""
        try:
            self._hand_over()
        except RunStoreError as error:
            if not _is_busy(error):
                self.notice(f"the rest of this run is not added to the run store: {error}")
                self._run_id = ""
        self._last_flush = time.monotonic()

    def _hand_over(self) -> None:
        self.store.add_lines(self._run_id, self._position, self._waiting)
        self._position += len(self._waiting)
        self._waiting = []


def _is_busy(error: RunStoreError) -> bool:
    return getattr(error.__cause__, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
