"""`metrics.jsonl` and `run.json`: no step twice, no half line, whatever happened before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora_compile.errors import CheckpointError, OutputError
from qlora_compile.runtime.metrics import (
    Clock,
    MetricsLog,
    finite_or_none,
    memory_bytes,
    read_metrics,
    versions,
    write_run,
)


def fill(path: Path, steps: range, last_step: int = 0) -> None:
    with MetricsLog(path, last_step) as log:
        for step in steps:
            log.write({"event": "step", "step": step, "loss": step / 2})


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_a_resumed_log_holds_each_step_once(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    fill(log, range(1, 9))
    fill(log, range(6, 11), last_step=5)
    assert steps_in(log) == list(range(1, 11))


def test_a_resumed_log_leaves_out_an_event_that_no_longer_holds(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    fill(log, range(1, 3))
    with MetricsLog(log, 2) as more:
        more.write({"event": "eval", "step": 2, "stage": "training"})
    with MetricsLog(log, 2, without="eval"):
        assert [line["event"] for line in read_metrics(log)] == ["step", "step"]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    fill(log, range(0, 4))
    fill(log, range(1, 3))
    assert steps_in(log) == [1, 2]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    fill(log, range(1, 4))
    with log.open("a") as file:
        file.write('{"event": "step", "st')
    assert steps_in(log) == [1, 2, 3]
    fill(log, range(4, 5), last_step=3)
    assert steps_in(log) == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{broken", "[1]", pytest.param("[" * 100_000, id="too deep"), '{"event": "step"}'])
def test_a_foreign_line_is_refused(tmp_path: Path, line: str) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        read_metrics(log)


def test_each_line_is_there_at_once_and_is_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 1, "loss": finite_or_none(float("nan"))})
        assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None}
        with pytest.raises(ValueError, match="not JSON compliant"):
            log.write({"step": 2, "loss": float("nan")})


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        MetricsLog(tmp_path / "no" / "m.jsonl")


def test_run_json_is_replaced_whole(tmp_path: Path) -> None:
    for status in ("running", "done"):
        write_run(tmp_path / "run.json", {"status": status})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "done"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("value", "wanted"), [(1.5, 1.5), (0.0, 0.0), (float("nan"), None), (float("inf"), None), (-float("inf"), None)]
)
def test_finite_or_none(value: float, wanted: float | None) -> None:
    assert finite_or_none(value) == wanted


def test_versions_and_memory() -> None:
    assert versions()["torch"] == torch.__version__ and "transformers" in versions()
    before = memory_bytes(torch.device("cpu"))
    block = torch.ones(40_000_000, dtype=torch.uint8)
    # Other allocations come and go; the block is most of the difference.
    assert memory_bytes(torch.device("cpu")) - before > 0.7 * block.nbytes


def test_the_estimate_leaves_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 102.0, 106.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(total_steps=20)
    assert clock.seconds_left(11) is None
    assert clock.seconds_left(12) == 8 * 2.0
    assert clock.seconds_left(13) == 7 * 3.0
