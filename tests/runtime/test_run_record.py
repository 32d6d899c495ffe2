"""However a run ends, its record says so, and what ended it comes out as it was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from qlora_compile.runtime import finetune as ft
from qlora_compile.runtime import run_record
from qlora_compile.runtime.finetune import finetune
from qlora_compile.runtime.finetune_config import FinetuneConfig
from qlora_compile.runtime.formats import atomic
from qlora_compile.runtime.reporters import SilentReporter, StepRecord
from qlora_compile.runtime.runs.store import STORE_NAME, RunStore

MakeConfig = Callable[..., FinetuneConfig]


class AtStep3(SilentReporter):
    """Calls `act` after the third step, and keeps what is said."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.said: list[str] = []

    def notice(self, message: str) -> None:
        self.said.append(message)

    def step(self, record: StepRecord) -> None:
        if record.step == 3:
            self.act()


def fail() -> None:
    raise RuntimeError("CUDA error: unspecified launch failure")


def ctrl_c_twice() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no kernel"), MemoryError()])
def test_nothing_is_left_of_a_run_that_took_no_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def prepare(*args: Any) -> None:
        raise error

    config = make_config(steps=1)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(ft, "prepare", prepare)
        finetune(config, SilentReporter())
    assert caught.value is error and not config.out.exists()
    assert RunStore(config.out.parent / STORE_NAME).runs() == []
    assert finetune(config, SilentReporter()).steps == 1  # the same command again


@pytest.mark.parametrize(
    ("act", "error", "status", "text"),
    [
        (fail, RuntimeError, "failed", "RuntimeError: CUDA error: unspecified launch failure"),
        (ctrl_c_twice, KeyboardInterrupt, "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_run_that_took_steps_says_how_it_ended(
    make_config: MakeConfig, act: Callable[[], None], error: type[BaseException], status: str, text: str
) -> None:
    config = make_config(save_every=2)
    with pytest.raises(error):
        finetune(config, AtStep3(act))
    found = json.loads((config.out / "run.json").read_text())
    assert (found["status"], found["step"], found["error"]) == (status, 3, text)
    (run,) = RunStore(config.out.parent / STORE_NAME).runs()
    assert (run.status, run.step) == (status, 3)
    assert finetune(make_config(resume=True), SilentReporter()).steps == 8


def test_an_end_that_cannot_be_recorded_does_not_hide_its_cause(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Any, content: dict[str, Any]) -> None:
        if content["status"] == "failed":
            with atomic.output_errors(path):
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_record, "write_run", full)
    reporter = AtStep3(fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        finetune(make_config(), reporter)
    assert any("how the run ended is not recorded: The disk is full" in said for said in reporter.said)
