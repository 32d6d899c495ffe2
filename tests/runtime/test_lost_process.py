"""What a process of a run says when another one is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from qlora_compile.errors import DistributedError
from qlora_compile.runtime import lost_process
from qlora_compile.runtime.distributed import Processes
from qlora_compile.runtime.lost_process import TermWatch, first_sentence, is_lost_connection, myself, who_ended

GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:419. This is "
    "typically caused by a remote worker crashing. Check its logs."
)


@pytest.fixture
def gone() -> Iterator[int]:
    """The number of a process that was killed and that nobody has waited for."""
    process = subprocess.Popen(["sleep", "60"])
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def three(gone: int) -> Processes:
    host, pid = myself()
    return Processes(0, 3, 0, ((host, pid), (host, gone), ("another host", gone)))


def test_a_lost_connection_names_the_process_that_is_gone(gone: int) -> None:
    with pytest.raises(DistributedError) as caught, three(gone).watched():
        try:
            raise RuntimeError(GLOO)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # the sentence is not cut short by torchrun
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert str(caught.value) == (
        "Process 0 of 3 lost process 1 (Connection closed by peer [127.0.0.1]:419): see its last output; the same "
        "command with --resume goes on from the newest checkpoint."
    )


def test_other_errors_pass(gone: int) -> None:
    with pytest.raises(RuntimeError, match="shapes"), three(gone).watched():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert first_sentence(RuntimeError()) == "RuntimeError"


def test_nobody_known_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_process, "LOOK_S", 0.01)
    members = (myself(), ("another host", 1))
    assert who_ended(members) == ""
    assert "lost another one (Timed out" in str(lost_process.lost(0, members, RuntimeError("Timed out waiting 9ms.")))


def test_sigterm_is_an_error_of_one_sentence(gone: int) -> None:
    for members, said in ((three(gone).members, "lost process 1"), ((myself(), myself()), "was told to end (SIGTERM)")):
        with pytest.raises(DistributedError) as caught, TermWatch(0, members)():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert said in str(caught.value)


def test_one_process_alone_keeps_its_signals() -> None:
    with Processes().ended_by_signal():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with TermWatch(0, (myself(), myself()))():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


WAITING = """
import hashlib, sys
from qlora_compile.runtime import lost_process
lost_process.GRACE_S = 0.3
host, pid = lost_process.myself()
with lost_process.TermWatch(0, ((host, pid), (host, int(sys.argv[1]))))():
    print("waiting", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # for many minutes in C code, where no handler runs
"""


@pytest.mark.slow
def test_a_process_that_waits_in_c_code_says_so_too(gone: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(gone)], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    time.sleep(0.5)  # until it is in there
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.startswith("error: Process 0 of 2 lost process 1: the same command with --resume")
