"""What a run says: plain lines in a log, a bar on a terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from qlora_compile.runtime.reporters import (
    EvalRecord,
    PlainReporter,
    ProgressReporter,
    StepRecord,
    describe,
    describe_eval,
    make_reporter,
)

RECORD = StepRecord(
    step=3,
    total_steps=9,
    loss=2.34567,
    lr=1e-4,
    grad_norm=0.5,
    tokens=100,
    tokens_per_s=312.4,
    seconds=1.5,
    memory_bytes=1_210_000_000,
    seconds_left=185.2,
)
EVAL = EvalRecord(step=0, stage="quantized", loss=3.3, perplexity=27.612, tokens=8176, seconds=12.3)


def test_a_step_in_words() -> None:
    assert describe(RECORD) == "loss 2.3457  312 tokens/s  1.21 GB  3:05 left"
    skipped = dataclasses.replace(RECORD, loss=None, seconds_left=None, skipped=True)
    assert describe(skipped) == "loss -  312 tokens/s  1.21 GB  skipped: the gradients are not finite"
    assert describe(dataclasses.replace(skipped, loss_scale=32768.0)).endswith("the loss scale is now 32768")
    assert describe_eval(EVAL) == "perplexity of the quantized model: 27.61 (8176 tokens, 12 s)"
    assert "step 40" in describe_eval(dataclasses.replace(EVAL, step=40, stage="training"))


def test_records_as_json() -> None:
    line = RECORD.to_dict()
    assert line["event"] == "step" and line["step"] == 3 and "seconds_left" not in line and "loss_scale" not in line
    assert dataclasses.replace(RECORD, loss_scale=2.0).to_dict()["loss_scale"] == 2.0
    assert EVAL.to_dict()["event"] == "eval"


def test_plain_lines_come_at_the_ends_and_now_and_then() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, every_s=1e6)
    reporter.start(2, 9)
    for step in range(3, 10):
        reporter.step(dataclasses.replace(RECORD, step=step, skipped=step == 6))
    reporter.evaluated(EVAL)
    reporter.saved(Path("out/step-9"), 9)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["step 3/9", "step 6/9", "step 9/9"]
    assert lines[3].startswith("perplexity") and "out/step-9" in lines[4] and len(lines) == 5
    always = PlainReporter(stream := io.StringIO(), every_s=0)
    always.start(0, 9)
    for step in range(1, 10):
        always.step(dataclasses.replace(RECORD, step=step))
    assert len(stream.getvalue().splitlines()) == 9


def test_the_bar_shows_progress_and_keeps_notices() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    reporter = ProgressReporter(console)
    reporter.notice("[loading] model")
    reporter.start(0, 9)
    reporter.step(RECORD)
    reporter.evaluated(EVAL)
    reporter.close()
    reporter.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[loading] model" in text and "3/9" in text and "loss 2.3457" in text and "27.61" in text


def test_the_stream_decides() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_reporter(io.StringIO()), PlainReporter)
    assert isinstance(make_reporter(Terminal()), ProgressReporter)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stream_that_is_gone_ends_no_run(terminal: bool) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return terminal

    reporter = make_reporter(Gone())
    assert isinstance(reporter, ProgressReporter) == terminal
    reporter.notice("loading model")
    reporter.start(0, 9)
    reporter.step(RECORD)
    reporter.evaluated(EVAL)
    reporter.saved(Path("out/step-9"), 9)
    reporter.close()
