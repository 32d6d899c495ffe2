"""`kill -9` at any moment, again and again: nothing corrupt, and no step lost or counted twice."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_compile.runtime.finetune import finetune
from qlora_compile.runtime.metrics import read_metrics
from qlora_compile.runtime.reporters import SilentReporter

ADAPTER = "adapter_model.safetensors"
STEPS_A_CYCLE = 6


def killed_after(config: Any, seconds: float) -> bool:
    """Run in a forked process (importing everything again takes ten times the run); -> whether it had to be killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            finetune(config, SilentReporter())
            code = 0
        except BaseException:
            traceback.print_exc()  # the parent learns no more than that it failed
            raise
        finally:
            os._exit(code)  # nothing of pytest's may run here
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build starts autograd's threads, which a fork lacks")
@pytest.mark.parametrize("cycles", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_runs_go_on_as_if_nothing_had_happened(make_config: Any, cycles: int) -> None:
    torch.set_num_threads(1)  # a forked process must not wait for another one's threads
    options: dict[str, Any] = {"optimizer": "paged_adamw", "optimizer_budget": "16KiB", "save_every": 2}
    options |= {"steps": STEPS_A_CYCLE * cycles, "batch": 1, "grad_accum": 1}
    begin = time.monotonic()
    whole = finetune(make_config("whole", **options), SilentReporter())
    pace = (time.monotonic() - begin) / (STEPS_A_CYCLE * cycles)
    draw, killed = random.Random(3), 0
    for _ in range(cycles):
        config = make_config("killed", resume=True, **options)
        killed += killed_after(config, 0.2 + draw.random() * 2 * STEPS_A_CYCLE * pace)
    last = finetune(make_config("killed", resume=True, **options), SilentReporter())
    assert killed >= cycles // 2
    steps = [line["step"] for line in read_metrics(last.out / "metrics.jsonl") if line["event"] == "step"]
    assert steps == [*range(1, STEPS_A_CYCLE * cycles + 1)]
    assert last.losses == whole.losses
    one, other = (load_file(result.out / "adapter" / ADAPTER) for result in (whole, last))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not [*last.out.glob("checkpoints/.*")] and not [*last.out.glob("checkpoints/*.set-aside")]
