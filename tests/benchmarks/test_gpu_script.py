"""benchmarks/gpu.py runs from end to end without a GPU, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow  # four models are compiled by Inductor
def test_small_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["wrong"] == [] and found["model"]["skipped"] == {}
    resident, paged = (found["paging"][name] for name in ("resident", "paged"))
    assert paged["moved_in_bytes"] > 0 and abs(paged["loss"] - resident["loss"]) < 1e-3
    contenders = {"ours", "dense_lora", "bitsandbytes"}
    assert set(found["model"]["training"]) == contenders | {"ours_without_logits"}
    assert set(found["model"]["decoding"]) == contenders
    profile = found["model"]["training"]["ours"]["profile"]
    assert profile["device_ms"] > 0 and any("run_backward" in name for name, *_ in profile["functions"])
    assert "y and dX, M=4096 N=[64, 32] K=96:" in done.stdout
    tables = list(tmp_path.glob("table-*.json"))
    assert len(tables) == 1 and json.loads(tables[0].read_text(encoding="utf-8"))["entries"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no GPU here" in done.stderr
