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
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def launch(world: int, script: Path, *args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """torchrun with `world` processes of one thread each; the caller looks at the return code."""
    command = [*TORCHRUN, f"--nproc-per-node={world}", str(script), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


Results = dict[str, Any]


@pytest.fixture(scope="session")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
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
