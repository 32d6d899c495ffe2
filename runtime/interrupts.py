"""Ctrl-C and SIGTERM in the middle of training: the step is finished, and the loop asks here whether to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from ..errors import QLoRACompileError


class InterruptedRunError(QLoRACompileError):
    """The run was stopped by a signal; the message says where its checkpoint lies."""

    exit_code = 1


class SignalWatch:
    """Within it the first SIGINT or SIGTERM only sets `signal_name`; the second acts as it did before.

    Python delivers signals to the main thread alone: in another thread it watches nothing.
    """

    def __init__(self, on_signal: Callable[[str], None]) -> None:
        self.on_signal = on_signal
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()
        self.on_signal(self.signal_name)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
