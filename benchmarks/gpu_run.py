"""Jobs, each in a process of its own -> one JSON file that loses nothing of what a job has kept.

Jobs of one group get ready side by side (imports, models, compilations), and then have the device one after the other: a
job calls `Child.turn` before what it times. While one has its turn all others wait, or are stopped where they were not ready
in time. A job that raises, dies or runs past its limit costs nothing but what it had not kept yet: it writes
DIR/parts/<job>.json as it goes, and after each job all parts are merged into DIR/gpu.json. Used by gpu.py; imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # gpu.py imports this before torch: what that takes counts too
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
READY_S = 150.0  # to get ready, at most
KILL_S = 20.0  # a process that hangs in a driver need not be gone at once

say = functools.partial(print, flush=True)
Found = dict[str, Any]


@dataclass
class Child:
    """What a job gets: the settings, what was found before it, a file of its own and a clock."""

    settings: Any
    found: Found
    file: Path
    end: float  # by time.monotonic(); then it is killed: the end of all turns, and of its own as soon as it has it
    limit: float  # seconds of its turn
    ready: Any  # an event of multiprocessing's
    go: Any  # a semaphore: who sets an event waits for those that wait for it, also for the dead
    kept: Found = field(default_factory=dict)

    def turn(self) -> None:
        """Returns when nothing else runs; what is timed comes after it. `found` has what the turns before have found."""
        if self.ready.is_set():
            return
        self.ready.set()
        self.go.acquire()
        self.end = min(time.monotonic() + self.limit, self.end)
        self.found = _read(self.file.parents[1] / "gpu.json")

    def keep(self, **values: Any) -> None:
        """Adds to what this job has found, or replaces it; from here on it is not lost."""
        kept = self.kept | values
        write_atomically(self.file, kept)
        self.kept = kept

    def left(self) -> float:
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Job:
    """`least` seconds must be left for its turn, after `limit` it is killed; `part` "": whatever parts were asked for."""

    name: str
    part: str
    work: Callable[[Child], None]
    least: float
    limit: float
    needs: tuple[str, ...] = ()  # packages


class Run:
    """What was found so far, the clock, and the file that is written after each job.

    `method` is multiprocessing's: "fork" spares each job the imports, as long as this process has not touched the device.
    """

    def __init__(
        self,
        out: Path,
        settings: Any,
        seconds: float,
        *,
        method: str = "fork",
        started: float = STARTED,
        summarize: Callable[[Found], list[Found]] = lambda found: [],
    ) -> None:
        self.settings, self.started, self.summarize = settings, started, summarize
        self._context: Any = multiprocessing.get_context(method)
        self.end = started + seconds
        self.file, self.parts, self.names = out / "gpu.json", out / "parts", list[str]()
        self.own: Found = {"errors": {}, "skipped": {}, "jobs": {}}
        self.found = self.own
        self.parts.mkdir(parents=True, exist_ok=True)
        for old in self.parts.glob("*.json"):  # of an earlier call
            old.unlink()

    def left(self) -> float:
        return self.end - time.monotonic()

    def skip(self, name: str, why: str) -> None:
        self.own["skipped"][name] = why
        say(f"not measured: {name}: {why}")
        self.write()

    def _can(self, job: Job, later: float = 0.0) -> bool:
        """Whether it can have its time, and `later` seconds be left; says why not."""
        missing = next((package for package in job.needs if importlib.util.find_spec(package) is None), None)
        if missing is None and self.left() >= job.least + later:
            return True
        self.skip(job.name, "no time left" if missing is None else f"{missing} is not installed")
        return False

    def do(self, jobs: Sequence[Job], later: float = 0.0, most: float = READY_S) -> None:
        """Runs jobs that get ready side by side, as far as there is time for all of their turns, or says why not; what they
        have kept is in the file afterwards, however they ended. Those that are not ready after `most` seconds, or when no
        more is left than all turns need at least and the `later` seconds of other groups, are stopped, and go on after the
        others."""
        able: list[Job] = []
        for job in jobs:
            if self._can(job, later=sum(other.least for other in able)):
                able.append(job)
        if not able:
            return
        jobs, begin = able, time.monotonic()
        say(f"== side by side, {begin - self.started:.0f} s after the start: {', '.join(job.name for job in jobs)}")
        waiting: dict[Job, tuple[BaseProcess, Child]] = {}
        try:
            for job in jobs:
                file, ready, go = self.parts / f"{job.name}.json", self._context.Event(), self._context.Semaphore(0)
                child = Child(self.settings, self.found, file, self.end, job.limit, ready, go)
                process = self._context.Process(target=_work, args=(job, child))
                process.start()
                with contextlib.suppress(OSError):  # the child does it too; whoever is first
                    os.setpgid(process.pid, process.pid)
                waiting[job] = process, child
            self._until_ready(waiting, sum(job.least for job in jobs) + later, most)
            say(f"ready, {time.monotonic() - self.started:.0f} s after the start")
            late = [job for job, (process, child) in waiting.items() if _gets_ready(process, child)]
            for job in late:
                _signal(waiting[job][0], signal.SIGSTOP)
            for job in sorted(jobs, key=late.__contains__):
                process, child = waiting[job]
                if job in late:
                    _signal(process, signal.SIGCONT)
                    self._until_ready({job: waiting[job]}, job.least + later, most)
                self._turn(job, process, child)
                del waiting[job]
        finally:  # also where a signal ends this script
            for process, _ in waiting.values():
                _end(process)

    def _until_ready(self, waiting: Mapping[Job, tuple[BaseProcess, Child]], reserve: float, most: float) -> None:
        end = time.monotonic() + min(most, self.left() - reserve)
        while time.monotonic() < end and any(_gets_ready(*one) for one in waiting.values()):
            time.sleep(0.05)

    def _turn(self, job: Job, process: BaseProcess, child: Child) -> None:
        begin, limit = time.monotonic(), min(job.limit, max(self.left(), 0.0))
        if _gets_ready(process, child):
            _end(process)
            self._close(job.name, "was not ready in time", 0.0)
            return
        say(f"== {job.name}, {begin - self.started:.0f} s after the start")
        child.go.release()
        try:
            process.join(limit)
        finally:  # also where a signal ends this script
            late = process.is_alive() and time.monotonic() - begin >= limit
            _end(process)
            why = f"ran past its limit of {limit:.0f} s" if late else _ending(process.exitcode)
            self._close(job.name, why, time.monotonic() - begin)

    def _close(self, name: str, why: str | None, seconds: float) -> None:
        self.names.append(name)
        self.own["jobs"][name] = {"seconds": seconds}
        told = _read(self.parts / f"{name}.json").get("errors", {}).get(name)
        if why is not None and told is None:
            self.own["errors"][name] = why
        if why is not None:
            say(f"ERROR: {name}: {told.strip().splitlines()[-1] if told else why}")
        self.write()

    def write(self) -> None:
        """Merges what all jobs have kept, with the summary of it, into the file."""
        self.own["seconds"] = time.monotonic() - self.started
        parts = (_read(self.parts / f"{name}.json") for name in self.names)
        self.found = functools.reduce(merged, parts, dict(self.own))
        try:
            self.found["summary"] = self.summarize(self.found)
        except Exception:  # noqa: BLE001  # kept in the file, and the exit code says so
            self.own["errors"]["summary"] = self.found["errors"]["summary"] = traceback.format_exc()
            say("ERROR: summary:", traceback.format_exc())
        write_atomically(self.file, self.found)

    def exit_code(self) -> int:
        """1 where a job failed or found something wrong."""
        return 1 if self.found["errors"] or self.found.get("wrong") else 0


def merged(first: Found, second: Found) -> Found:
    """Both: of the same key dictionaries key by key, lists one after the other, else the second's value."""
    out = dict(first)
    for key, value in second.items():
        known = out.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            out[key] = merged(known, value)
        else:
            out[key] = [*known, *value] if isinstance(known, list) and isinstance(value, list) else value
    return out


def write_atomically(path: Path, value: Found) -> None:
    """JSON; a reader finds the old file or the new one, whole."""
    text = json.dumps(value, indent=1) + "\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> Found:
    """A job's file; empty for one that kept nothing."""
    if not path.exists():
        return {}
    found: Found = json.loads(path.read_text(encoding="utf-8"))
    return found


def _work(job: Job, child: Child) -> None:
    """The child's side. Its group is its own, so that what it starts (compilers) can be ended with it."""
    os.setpgid(0, 0)
    _end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        job.work(child)
    except Exception:  # noqa: BLE001  # kept in its file, and the exit code says so
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        child.keep(errors={job.name: traceback.format_exc()})
        sys.exit(1)


def _end_with_parent() -> None:
    """Whatever ends the script ends this process, also what no script can catch: no job stays on the GPU. On Linux."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it is gone already
        os.kill(os.getpid(), signal.SIGKILL)


def _gets_ready(process: BaseProcess, child: Child) -> bool:
    return process.is_alive() and not child.ready.is_set()


def _signal(process: BaseProcess, number: int) -> None:
    """To its group."""
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may be gone
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has no group yet
                os.kill(process.pid, number)


def _end(process: BaseProcess) -> None:
    """Kills a process that still runs, and its group."""
    if process.is_alive() and process.pid is not None:
        _signal(process, signal.SIGKILL)
        process.kill()
        process.join(KILL_S)


def _ending(code: int | None) -> str | None:
    """Why a process is no success, in words."""
    if code is None:
        return f"still runs {KILL_S:.0f} s after it was killed"
    return None if code == 0 else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
