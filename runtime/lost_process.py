"""What a process of a run says when another one is gone: which, as far as is known, and how to go on.

The network says that a connection closed, not whose. Processes of one machine look for each other by number; what one of
them finds, or what it ends with itself, it notes in the store through which they met, and the first note holds for all.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from ..errors import DistributedError

LOOK_S = 1.0  # a connection closes a moment before its process is gone
STORE_S = 2.0  # to wait for the store, which may be gone too
GRACE_S = 5.0  # for a process that waits for a lost one to be told so by the network
KEY = "qlora_compile/first_end"
WAY_OUT = "the same command with --resume goes on from the newest checkpoint"
_LOST = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "Timed out", "gloo", "unhandled system error")

Member = tuple[str, int]  # host, process number


def myself() -> Member:
    return socket.gethostname(), os.getpid()


def is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def first_sentence(error: BaseException) -> str:
    """What an exception says first, without the C++ file and line that gloo puts before it."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", line).partition(". ")[0].rstrip(". ") or type(error).__name__


def note_end(text: str) -> str:
    """Note who ended, or read it where another process was first; "" where the store is gone. `text` "": only read."""
    if not dist.is_initialized():
        return text
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(datetime.timedelta(seconds=STORE_S))
    try:
        if text:
            return store.compare_set(KEY, "", text).decode()
        return store.get(KEY).decode() if store.check([KEY]) else ""
    except RuntimeError:  # all that torch raises for a store that does not answer
        return text


def who_ended(members: Sequence[Member]) -> str:
    """`process 1`, with what it ended with where it could say that; "" where nobody is known to be gone."""
    gone = [f"process {rank}" for rank, (host, pid) in enumerate(members) if host == myself()[0] and _is_gone(pid)]
    return note_end(" and ".join(gone))


def lost(rank: int, members: Sequence[Member], error: BaseException) -> DistributedError:
    """The error for this process, whose exchange with another one failed with `error`."""
    end = time.monotonic() + LOOK_S
    while not (who := who_ended(members)) and time.monotonic() < end:
        time.sleep(0.05)
    return DistributedError(
        f"Process {rank} of {len(members)} lost {who or 'another one'} ({first_sentence(error)}): "
        f"see its last output; {WAY_OUT}."
    )


def _is_gone(pid: int) -> bool:
    """Ended, though its parent may not have noticed yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or no /proc here
        return False
    return state in "ZX"


class TermWatch:
    """Within it SIGTERM raises DistributedError, and one that waits for a lost process says so before it is killed.

    torchrun sends SIGTERM to all others when one process has ended, and SIGKILL half a minute later. Python's handlers do
    not run while an exchange waits, so a thread listens too: after GRACE_S with a process gone, or at a second SIGTERM, it
    prints the sentence and ends this process. Outside the main thread nothing is watched.
    """

    def __init__(self, rank: int, members: Sequence[Member]) -> None:
        self.rank, self.members = rank, members

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if len(self.members) < 2 or threading.current_thread() is not threading.main_thread():
            yield
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        before_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = signal.signal(signal.SIGTERM, self._raise)
        threading.Thread(target=self._listen, args=(read,), daemon=True).start()
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # see `leave_the_last_word`
                signal.signal(signal.SIGTERM, before)
            signal.set_wakeup_fd(before_fd)
            os.close(write)

    def sentence(self) -> str:
        who = who_ended(self.members)
        reason = f"lost {who}" if who else "was told to end (SIGTERM)"
        return f"Process {self.rank} of {len(self.members)} {reason}: {WAY_OUT}."

    def _raise(self, number: int, frame: FrameType | None) -> None:
        leave_the_last_word()
        raise DistributedError(self.sentence())

    def _listen(self, read: int) -> None:
        signals, told = 0, 0.0
        while True:
            ready, _, _ = select.select([read], [], [], 0.2 if signals else None)
            if ready:
                received = os.read(read, 64)
                if not received:
                    break
                signals += received.count(signal.SIGTERM)
                told = time.monotonic()
            waited = time.monotonic() - told
            if (signals > 1 and waited > 1) or (signals and waited > GRACE_S and who_ended(self.members)):
                sys.stderr.write(f"error: {self.sentence()}\n")
                sys.stderr.flush()
                os._exit(1)
        os.close(read)


def leave_the_last_word() -> None:
    """This process is about to say why it ends: SIGTERM no longer does that for it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
