"""Runs the worker scripts beside these tests under torchrun, several checks to a launch: starting costs seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
Results = dict[str, Any]
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def _torchrun(world: int, *args: object) -> list[str]:
    """The command line of `world` processes of a script (or `-m` and a module) and its arguments."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}")
    module = ["-m"] if args[0] == "-m" else []
    return [*start, *module, "--", *map(str, args[len(module) :])]  # or torchrun takes --r for an option of its own


def _launch(world: int, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}
    return subprocess.run(_torchrun(world, *args), env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., list[str]]:
    """`torchrun(2, SCRIPT, *args)` or `torchrun(2, "-m", MODULE, *args)` -> the command line."""
    return _torchrun


@pytest.fixture(scope="session")
def launch() -> Launch:
    """`launch(2, SCRIPT, *args)`: run it to the end, one thread a process; the caller looks at the return code."""
    return _launch


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory, launch: Launch) -> Callable[..., Results]:
    """`checks("ddp", 2, ("eager", "compiled"))` -> what tests/distributed/ddp_worker.py found; launched once a run."""
    done: dict[tuple[str, int, tuple[str, ...]], Results | None] = {}

    def run(worker: str, world: int, names: tuple[str, ...]) -> Results:
        key = (worker, world, names)
        if key not in done:
            out = tmp_path_factory.mktemp(worker) / "found.json"
            done[key] = None
            process = launch(world, FOLDER / f"{worker}_worker.py", out, *names)
            assert process.returncode == 0, process.stderr[-6000:]
            done[key] = json.loads(out.read_text())
        found = done[key]
        assert found is not None, f"{worker} failed before: see the first error"
        return found

    return run
