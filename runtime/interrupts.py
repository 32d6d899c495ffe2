"""Ctrl-C, SIGTERM and SIGHUP in the middle of training: the step is finished, and the loop asks here whether to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from ..errors import QLoRACompileError
from ..interruption import SIGHUP


class InterruptedRunError(QLoRACompileError):
    """The run was stopped by a signal; the message says where its checkpoint lies."""

    exit_code = 1


class SignalWatch:
    """Within it the first SIGINT, SIGTERM or SIGHUP only sets `signal_name`; the second acts as it did before.

    Not so SIGHUP, which a closed terminal and its shell both send: one after the first signal is ignored, and all are
    where they were (nohup). Python delivers signals to the main thread alone: in another thread it watches nothing.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self.on_signal = on_signal
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, SIGHUP):
                if number is not None and (number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore(*self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            return
        self.signal_name = signal.Signals(number).name
        self._restore(signal.SIGINT, signal.SIGTERM)
        self.on_signal(self.signal_name)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))
