"""The run store: what a run puts there, several processes at once, and a store that is none."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_compile.errors import ConfigError, RunStoreError, UnknownOptionError
from qlora_compile.runtime.finetune import finetune
from qlora_compile.runtime.interrupts import InterruptedRunError
from qlora_compile.runtime.metrics import read_metrics
from qlora_compile.runtime.reporters import SilentReporter, StepRecord
from qlora_compile.runtime.runs.recorder import StoreSink
from qlora_compile.runtime.runs.store import STORE_NAME, RunStore, find_store

Records = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


class Recorder(SilentReporter):
    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.notices: list[str] = []

    def notice(self, message: str) -> None:
        self.notices.append(message)

    def step(self, record: StepRecord) -> None:
        if record.step == self.stop_at:
            raise InterruptedRunError("stopped by the test")


def test_a_run_and_its_lines_are_in_the_store(make_config: Any, texts: Path) -> None:
    config = make_config("first", eval_data=texts)
    result = finetune(config, SilentReporter())
    store = find_store(config.out.parent)
    (run,) = store.runs()
    assert (run.folder, run.status, run.step) == ("first", "done", 8)
    assert run.config == config.to_dict() and run.results["perplexity"] == result.perplexity
    assert run.id == json.loads((config.out / "run.json").read_text())["id"]
    assert store.lines(run.id) == read_metrics(config.out / "metrics.jsonl")
    assert [line["loss"] for line in store.lines(run.id, "step")] == list(result.losses)
    for line in store.lines(run.id, "eval"):
        indices, losses, tokens = zip(*line["documents"])
        assert indices == (0, 1) and sum(tokens) == line["tokens"]
        assert sum(losses) / sum(tokens) == pytest.approx(line["loss"], rel=1e-12)  # the same sums in fp64


def test_a_resumed_run_is_one_run_without_a_step_twice(make_config: Any) -> None:
    config = make_config("cut")
    with pytest.raises(InterruptedRunError):
        finetune(config, Recorder(stop_at=5))  # the last checkpoint is of step 3
    store = find_store(config.out.parent)
    assert store.find("cut").status == "interrupted"
    finetune(make_config("cut", resume=True), SilentReporter())
    (run,) = store.runs()
    assert run.status == "done"
    assert [line["step"] for line in store.lines(run.id)] == list(range(1, 9))


def test_a_run_that_failed_before_its_first_step_is_not_listed(make_config: Any) -> None:
    config = make_config("bad", qlora={"target_modules": ("no_such_layer",)})
    with pytest.raises(Exception, match="no_such_layer"):
        finetune(config, SilentReporter())
    assert find_store(config.out.parent).runs() == []


def test_runs_are_found_by_folder_and_id(tmp_path: Path, records: Records) -> None:
    make_run, step_line, _ = records
    store = RunStore(tmp_path / "s.sqlite")
    store.put_run(make_run("aaaa1111"), "one", [step_line(1)])
    store.put_run(make_run("bbbb2222"), "two", [])
    store.put_run(make_run("cccc3333"), "one", [])  # the folder was removed and used again
    assert store.find("one").id in ("aaaa1111", "cccc3333") and store.find("bbbb").folder == "two"
    with pytest.raises(UnknownOptionError, match="Unknown run 'onne': did you mean 'one'"):
        store.find("onne")
    with pytest.raises(UnknownOptionError):
        store.find("bb")  # too short to be meant


WRITER = """
import sys
from pathlib import Path
from qlora_compile.runtime.runs.recorder import StoreSink
name, folder = sys.argv[1], Path(sys.argv[2])
run = {"id": name * 6, "status": "running", "step": 0, "config": {}, "versions": {}, "data": {}}
notices = []
sink = StoreSink(folder / name, notices.append)
sink.started(run, [])
for step in range(1, 301):
    sink._last_flush = 0.0  # every line by itself: the most contention that there can be
    sink.line({"event": "step", "step": step, "loss": 1.0})
sink.ended(run | {"status": "done", "step": 300})
sys.exit(len(notices))
"""


def test_processes_write_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name, str(tmp_path)]) for name in ("ab", "cd", "ef")]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    store = find_store(tmp_path)
    assert {run.folder: run.status for run in store.runs()} == dict.fromkeys(("ab", "cd", "ef"), "done")
    for run in store.runs():
        assert [line["step"] for line in store.lines(run.id)] == list(range(1, 301))


def test_a_locked_store_delays_lines_and_loses_none(tmp_path: Path, records: Records) -> None:
    make_run, step_line, _ = records
    notices: list[str] = []
    sink = StoreSink(tmp_path / "run", notices.append)
    sink.started(make_run(), [])
    other = sqlite3.connect(tmp_path / STORE_NAME, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    sink.line(step_line(1))
    other.rollback()
    other.close()
    sink.line(step_line(2))
    sink.ended(make_run(status="done", step=2))
    assert notices == [] and [line["step"] for line in sink.store.lines("a1b2c3d4e5f6")] == [1, 2]


@pytest.mark.parametrize("content", [b"this is no database, by any means" * 99, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_corrupt_store_is_said_once_and_training_goes_on(make_config: Any, content: bytes) -> None:
    config = make_config(steps=2)
    path = config.out.parent / STORE_NAME
    path.write_bytes(content)
    reporter = Recorder()
    assert finetune(config, reporter).steps == 2
    (notice,) = [notice for notice in reporter.notices if "run store" in notice]
    assert "cannot be written" in notice and "move it away" in notice
    assert path.read_bytes() == content
    with pytest.raises(RunStoreError, match=r"cannot be read .*move it away"):
        find_store(path).runs()


def test_a_store_that_breaks_while_training(tmp_path: Path, records: Records) -> None:
    make_run, step_line, _ = records
    notices: list[str] = []
    sink = StoreSink(tmp_path / "run", notices.append)
    sink.started(make_run(), [])
    (tmp_path / STORE_NAME).write_bytes(b"overwritten" * 1000)
    for step in range(1, 4):
        sink._last_flush = 0.0
        sink.line(step_line(step))
    sink.ended(make_run(status="done"))
    assert len(notices) == 1 and "the rest of this run is not added" in notices[0]


def test_no_store_and_a_store_of_the_future(tmp_path: Path, records: Records) -> None:
    with pytest.raises(ConfigError, match="There is no run store"):
        find_store(tmp_path).runs()
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(RunStoreError, match="no runs table"):
        find_store(tmp_path / "empty.sqlite").runs()
    store = RunStore(tmp_path / "new.sqlite")
    store.put_run(records[0](), "run", [])
    database = sqlite3.connect(store.path)
    database.execute("PRAGMA user_version = 9")
    database.commit()
    database.close()
    with pytest.raises(RunStoreError, match="newer qlora-compile, version 9"):
        store.runs()
