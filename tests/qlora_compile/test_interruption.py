"""A signal ends a command in one sentence, wherever it comes; nothing of it is changed for a library."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import qlora_compile as qc
from qlora_compile import cli, cli_doctor, interruption
from qlora_compile.config import QLoRAConfig
from qlora_compile.errors import ConfigError
from qlora_compile.pass_manager import PassContext, run_passes
from qlora_compile.state import ModelEdits

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    hook = sys.unraisablehook
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before and sys.unraisablehook is hook
    assert not interruption.heard()


# What is listened to


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_an_interrupt_that_is_remembered(number: signal.Signals) -> None:
    with interruption.listening():
        assert not interruption.heard()
        interruption.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert interruption.heard()
        with pytest.raises(KeyboardInterrupt):
            interruption.check()


def test_nohup_and_torchrun_keep_their_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption.listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interruption.listening():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_closed_terminal_says_so_twice() -> None:
    with interruption.listening():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)


# Where it must not arrive


def test_within_deferred_it_is_noted_and_then_raised() -> None:
    steps = []
    with interruption.listening():
        with pytest.raises(KeyboardInterrupt), interruption.deferred(), interruption.deferred():
            signal.raise_signal(signal.SIGTERM)
            steps.append("went on")
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends the process
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interruption.deferred():
            interruption.check()
            steps.append("not here")
    assert steps == ["went on"]


def test_in_a_library_nothing_is_deferred() -> None:
    with interruption.deferred():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interruption.check()


def test_a_trace_is_interrupted_between_its_parts(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Callable[..., torch.nn.Module]
) -> None:
    """torch's C++ code calls Python for each op of fake tensors; an exception out of such a call may abort the process."""
    dispatch, arrived = FakeTensorMode.dispatch, list[bool]()

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not arrived:
            arrived.append(False)
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                arrived[0] = True
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(FakeTensorMode, "dispatch", interrupted)
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with interruption.listening(), pytest.raises(KeyboardInterrupt):
        qc.trace(tiny_llama(), {"input_ids": tokens, "labels": tokens}, {"r": 3})
    assert arrived == [False]


def test_passes_are_interrupted_between_each_other() -> None:
    ran = []

    def first(gm: torch.fx.GraphModule, ctx: PassContext) -> int:
        signal.raise_signal(signal.SIGINT)
        ran.append("first")
        return 0

    def second(gm: torch.fx.GraphModule, ctx: PassContext) -> int:
        ran.append("second")
        return 0

    config = QLoRAConfig()
    gm = torch.fx.symbolic_trace(torch.nn.ReLU())
    with interruption.listening(), pytest.raises(KeyboardInterrupt), interruption.deferred():
        run_passes(gm, PassContext(config, ModelEdits(torch.nn.Module(), config)), (first, second))
    assert ran == ["first"]


# The command line


def _doctor(monkeypatch: pytest.MonkeyPatch, examine: Callable[[], object]) -> int:
    monkeypatch.setattr(cli_doctor, "examine", examine)
    return cli.main(["doctor"])


@pytest.mark.parametrize("becomes", [None, RecursionError("too deep"), ConfigError("r must be 1."), SystemExit(0)])
def test_whatever_becomes_of_it_the_command_was_interrupted(
    becomes: BaseException | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine() -> dict[str, object]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None
        return {"ok": True, "advice": [], "versions": {}, "platform": "", "devices": [], "compiler": "", "kernels": {},
                "backend_registered": True}  # fmt: skip

    assert _doctor(monkeypatch, examine) == 1
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_what_a_finalizer_swallows_is_raised_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def examine() -> None:
        thing: Finalized | None = Finalized()
        del thing
        gc.collect()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)
        pytest.fail("it was lost")

    started = time.monotonic()
    assert _doctor(monkeypatch, examine) == 1
    assert time.monotonic() - started < 15
    assert capsys.readouterr().err == "error: interrupted.\n"


IMPORTING = """
import signal, sys
from importlib.abc import MetaPathFinder
class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.raise_signal(getattr(signal, sys.argv[2]))
sys.meta_path.insert(0, Finder())
from qlora_compile.cli import main
sys.exit(main(["runs", "list", "--store", sys.argv[3]]))
"""


@pytest.mark.parametrize(
    ("module", "name"),  # of the command line; of what torch's C++ code imports
    [("typer", "SIGINT"), ("typer", "SIGTERM"), ("typer", "SIGHUP"), ("numpy.linalg", "SIGINT")],
)
def test_while_it_imports(module: str, name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTING, module, name, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "error: interrupted.\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, name, None)

    def examine() -> None:
        raise ConfigError(f"isatty: {sys.stdout.isatty()}, {sys.stderr.isatty()}")

    assert _doctor(monkeypatch, examine) == 2
    said = "" if name == "stderr" else "error: isatty: False, False\n"
    assert capsys.readouterr().err == said
    getattr(sys, name).close()


def test_a_terminal_that_is_gone_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    def examine() -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(sys, "stderr", Gone())
    assert _doctor(monkeypatch, examine) == 1
    sys.stderr.write("nothing fails when Python ends")
    sys.stderr.close()
