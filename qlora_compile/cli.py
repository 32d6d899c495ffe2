"""The command line's entry, `qlora-compile`: a signal ends any command in one sentence, also while it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import interruption

EXIT_INTERRUPTED = 1


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit code: 0 done, 1 failed, 2 wrong use.

    Errors of ours and of the command line become one sentence on standard error; other exceptions are bugs and keep
    their traceback. After a signal nothing is: what it interrupted may have made any exception of it, or none.
    """
    _open_missing_streams()
    with interruption.listening():
        try:
            with interruption.deferred():
                from .cli_app import run
            code, message = run(sys.argv[1:] if args is None else args)
        except BaseException as error:
            if not (interruption.heard() or isinstance(error, KeyboardInterrupt)):
                raise
            code, message = EXIT_INTERRUPTED, "interrupted."
        if interruption.heard():
            code, message = EXIT_INTERRUPTED, "interrupted."
    if message:
        _say(f"error: {' '.join(message.split())}\n")  # whole: other processes of a run write there too
    return code


def _open_missing_streams() -> None:
    """A stream that the caller closed (`>&-`) is None: what is written there goes nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  # as long as we run


def _say(line: str) -> None:
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except OSError:  # a terminal that is gone: the exit code says it, if no stream fails when Python ends
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


if __name__ == "__main__":
    sys.exit(main())
