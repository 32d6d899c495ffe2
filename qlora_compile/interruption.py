"""Signals that end a command: noted and raised as KeyboardInterrupt, or only noted where an exception must not arrive.

An exception out of a signal handler comes between any two lines. Where those are a callback of torch's C++ code it may end
the process, or be lost, as it is in a finalizer. So what runs such code does it within `deferred()`, and calls `check()`
where an exception can be raised. All of this holds while the command line listens: in a library nothing is changed.
"""

from __future__ import annotations

import _thread
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGHUP = getattr(signal, "SIGHUP", None)  # not on Windows
AGAIN_S = 0.05

_before: dict[int, Any] = {}  # signal -> its handler before ours, while the command line listens
_heard = False
_deferrals = 0
_timers: list[threading.Timer] = []  # that raise again what a finalizer lost


@contextmanager
def listening() -> Iterator[None]:
    """Within it SIGINT, SIGTERM and SIGHUP are ours, except those that were ignored (nohup). In the main thread alone.

    torchrun ends its processes by SIGTERM while they wait in C++ code for each other, where only the default ends them.
    """
    global _heard, _deferrals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP) if number is not None]
    _heard, _deferrals = False, 0
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_unraisable, hook)
    for number in numbers if alone else numbers[:1]:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's
            _before[number] = signal.getsignal(number)
    try:
        _install()
        yield
    finally:
        while _timers:  # what they would raise is of this command
            _timers.pop().cancel()
        while _before:
            signal.signal(*_before.popitem())
        sys.unraisablehook = hook
        _heard = False


def heard() -> bool:
    """Whether a signal came since the command began, whatever became of its exception; False in a library."""
    return _heard


def check() -> None:
    """Raise KeyboardInterrupt if a signal came: for places where it can be raised, within `deferred` or not."""
    if _heard and _listens():
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a first signal is only noted, and raised at the end or by `check`; a second one ends the process."""
    global _deferrals
    if not _listens():
        yield
        return
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1
        if _heard and not _deferrals:
            _install()
    check()


class Whole(ContextDecorator):
    """Within it SIGINT waits for the end, for what must not stay half done: for moments, in a library too. Also `@whole`.

    Only where Python handles the signal (a notebook, a script), in the main thread; what is then raised or noted is up to
    the handler that was there.
    """

    def __init__(self) -> None:
        self._depth, self._came = 0, False
        self._handler: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._depth:
            self._came, handler = False, signal.getsignal(signal.SIGINT)
            self._handler = handler if callable(handler) else None
            if self._handler is not None:
                signal.signal(signal.SIGINT, self._note)
        self._depth += 1

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if not self._depth and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._came:
                self._handler(signal.SIGINT, None)


whole = Whole()


def _listens() -> bool:
    return bool(_before) and threading.current_thread() is threading.main_thread()


def _install() -> None:
    for number in _before:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _heard
    first, _heard = not _heard, True
    if _deferrals:
        for each in _before.keys() - {SIGHUP}:
            signal.signal(each, signal.SIG_DFL)
    elif first or number != SIGHUP:  # a terminal that closes says so twice: itself, and by its shell
        raise KeyboardInterrupt


def _unraisable(hook: Callable[[UnraisableHookArgs], Any], what: UnraisableHookArgs) -> None:
    """A finalizer lost the exception: it is raised again a moment later, and nothing is said of it."""
    if not (_heard and issubclass(what.exc_type, KeyboardInterrupt)):
        hook(what)
        return
    again = threading.Timer(AGAIN_S, _raise_again)
    again.daemon = True
    _timers.append(again)
    again.start()


def _raise_again() -> None:
    for number in list(_before)[:1]:
        _thread.interrupt_main(signal.Signals(number))
