"""The first signal asks, the second acts."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from qlora_compile.runtime.interrupts import SignalWatch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(number: signal.Signals) -> None:
    said: list[str] = []
    acted: list[int] = []
    before = signal.signal(number, lambda n, frame: acted.append(n))
    try:
        with SignalWatch(said.append) as watch:
            assert watch.signal_name is None
            os.kill(os.getpid(), number)
            assert watch.signal_name == number.name and said == [number.name] and acted == []
            os.kill(os.getpid(), number)
            assert acted == [number] and said == [number.name]
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_is_one_signal_and_nohup_none() -> None:
    """The terminal says so itself, and the shell that it ran in does."""
    acted: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda n, frame: acted.append(n))
    try:
        said: list[str] = []
        with SignalWatch(said.append) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.signal_name == "SIGHUP" and said == ["SIGHUP"]
        os.kill(os.getpid(), signal.SIGHUP)
        assert acted == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with SignalWatch(said.append) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
        assert watch.signal_name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), SignalWatch(print):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_it_watches_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def work() -> None:
        with SignalWatch(print):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
