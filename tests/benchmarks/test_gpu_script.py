"""benchmarks/gpu.py runs from end to end without a GPU, at tiny sizes; what fails loses nothing of what was measured."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "gpu.py"
CONTENDERS = {"ours", "dense_lora", "bitsandbytes"}
ODD = (5, (33, 17), 96, 0.0)  # M, N, K, dropout


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one of the script's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.slow  # seven models are compiled by Inductor
def test_small_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert "wrong" not in found and found["skipped"] == {} and found["errors"] == {} and found["seconds"] > 0
    assert found["checks"]["compared"] > 20 and {"device", "versions"} <= set(found["machine"])
    resident, paged = (found["paging"][name] for name in ("resident", "paged"))
    assert paged["moved_in_mb"] > 0 and abs(paged["loss_last"] - resident["loss_last"]) < 1e-3
    assert paged["all_there"]["optimizer_s"] > 0 and paged["timeline"]["reading"]
    assert len(found["optimizer_alone"]) == 4 and all(times for times in found["optimizer_alone"].values())
    assert [row["count"] for row in found["chained"]] == [10]
    assert set(found["model"]["training"]) == CONTENDERS | {"ours_without_logits", "bitsandbytes_bf16"}
    assert set(found["model"]["decoding"]) == CONTENDERS
    profile = found["model"]["training"]["ours"]["profile"]
    assert profile["device_ms"] > 0 and profile["launches"] > 100 and profile["kernels"]
    assert profile["python_ms"] > 0 and len(profile["functions"]) == 20
    assert [row["m"] for row in found["linear"] if row["op"] == "lora_linear"] == [1, 4096, 16]
    for what in (
        "y and dX, M=4096 N=[64, 32] K=96: ",
        "training step of qlora-compile / dense",
        "paged optimizer's step",
    ):
        assert what in done.stdout and any(one["what"].startswith(what.strip(": ")) for one in found["summary"])
    (table,) = tmp_path.glob("table-*.json")
    assert {entry["m"] for entry in json.loads(table.read_text(encoding="utf-8"))["entries"]} == {1, 16, 4096}


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no GPU here" in done.stderr


def _good(child: Any) -> None:
    child.turn()
    child.keep(rows=[len(child.found.get("rows", []))])


def _raises(child: Any) -> None:
    child.keep(rows=[10], model={"training": {"raises": 1.0}})
    raise ValueError("no such kernel")


def _hangs(child: Any) -> None:
    child.turn()
    child.keep(rows=[20])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])  # is ended with its parent
    time.sleep(100)


def _dies(child: Any) -> None:
    child.turn()
    child.keep(rows=[30], model={"training": {"dies": 2.0}})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_that_fails_loses_nothing_that_was_kept(module: Callable[[str], Any], tmp_path: Path) -> None:
    gpu_run = module("gpu_run")
    run = gpu_run.Run(tmp_path, None, 60.0, started=time.monotonic())
    for name, work in {"first": _good, "raises": _raises, "hangs": _hangs, "dies": _dies, "last": _good}.items():
        run.do([gpu_run.Job(name, "", work, 0.5, 3.0 if name == "hangs" else 30.0)])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["rows"] == [0, 10, 20, 30, 4]  # in order, and the last job saw what the others had kept
    assert found["model"] == {"training": {"raises": 1.0, "dies": 2.0}}
    errors = found["errors"]
    assert list(errors) == ["hangs", "dies", "raises"] and "_raises" in errors["raises"]
    assert errors["raises"].strip().endswith("ValueError: no such kernel")
    assert errors["hangs"] == "ran past its limit of 3 s" and errors["dies"] == "killed by SIGKILL"
    assert run.exit_code() == 1 and set(found["jobs"]) == {"first", "raises", "hangs", "dies", "last"}
    assert found["jobs"]["hangs"]["seconds"] < 20


def _timed(child: Any) -> None:
    child.keep(ready=[child.file.stem])
    child.turn()
    before = time.monotonic()
    time.sleep(0.3)
    child.keep(turns=[(before, time.monotonic())], saw=[len(child.found.get("turns", []))])


def _slow_to_get_ready(child: Any) -> None:
    for _ in range(60):  # stopped meanwhile
        time.sleep(0.05)
    _timed(child)


def _never_ready(child: Any) -> None:
    child.keep(wrong=["kept"])
    time.sleep(100)


def test_jobs_get_ready_together_and_have_their_turns_alone(module: Callable[[str], Any], tmp_path: Path) -> None:
    gpu_run = module("gpu_run")
    run = gpu_run.Run(tmp_path, None, 14.0, started=time.monotonic())
    works = {"late": _slow_to_get_ready, "first": _timed, "raises": _raises, "never": _never_ready, "second": _timed}
    # 12.5 seconds are kept for turns: what is not ready after a second waits until the others are done
    run.do([gpu_run.Job(name, "", work, 2.5, 5.0) for name, work in works.items()])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["jobs"].keys() == works.keys() and found["ready"] == ["first", "second", "late"]
    assert found["saw"] == [0, 1, 2]  # what the turns before have found
    turns = found["turns"]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(turns))
    assert found["errors"]["never"] == "was not ready in time" and "ValueError" in found["errors"]["raises"]
    assert found["wrong"] == ["kept"]


def _dies_while_it_waits(child: Any) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    child.turn()


def test_a_job_that_dies_while_it_waits_is_not_waited_for(module: Callable[[str], Any], tmp_path: Path) -> None:
    gpu_run = module("gpu_run")
    run = gpu_run.Run(tmp_path, None, 30.0, started=time.monotonic())
    works = {"first": _slow_to_get_ready, "dies": _dies_while_it_waits, "second": _timed}
    run.do([gpu_run.Job(name, "", work, 1.0, 5.0) for name, work in works.items()], later=5.0)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["errors"] == {"dies": "killed by SIGKILL"} and len(found["turns"]) == 2


def test_who_hangs_while_it_gets_ready_leaves_time_to_later_groups(
    module: Callable[[str], Any], tmp_path: Path
) -> None:
    gpu_run = module("gpu_run")
    run = gpu_run.Run(tmp_path, None, 12.0, started=time.monotonic())
    run.do([gpu_run.Job("never", "", _never_ready, 1.0, 5.0)], later=8.0, most=100.0)
    run.do([gpu_run.Job(name, "", _timed, 3.0, 5.0) for name in ("later", "more")])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["errors"] == {"never": "was not ready in time"} and len(found["turns"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for it")
def test_a_job_ends_with_a_script_that_is_killed(tmp_path: Path) -> None:
    script = f"""if True:
        import os, sys, time
        sys.path.insert(0, {str(FOLDER)!r})
        import gpu_run
        from pathlib import Path
        def work(child):
            child.turn()
            child.keep(process=os.getpid())
            time.sleep(100)
        run = gpu_run.Run(Path({str(tmp_path)!r}), None, 100.0)
        run.do([gpu_run.Job("hangs", "", work, 1.0, 90.0)])
    """
    part = tmp_path / "parts" / "hangs.json"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        _wait_for(part.exists)
        job = Path("/proc", str(json.loads(part.read_text(encoding="utf-8"))["process"]))
        assert _runs(job)
        parent.kill()
    _wait_for(lambda: not _runs(job))


def _runs(process: Path) -> bool:
    """By its folder in /proc; one that ended is a zombie until somebody asks how."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_pythons_profile_has_the_backward_pass(module: Callable[[str], Any]) -> None:
    """On a GPU autograd would run it on a thread of its own, which cProfile does not see."""
    seen = list[bool]()
    found = module("gpu_profile").in_python(lambda: seen.append(torch._C._is_multithreading_enabled()))
    assert seen == [False] and torch._C._is_multithreading_enabled() and found["functions"]


def test_no_job_starts_that_cannot_get_its_time(module: Callable[[str], Any], tmp_path: Path) -> None:
    gpu_run = module("gpu_run")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "short.json").write_text('{"rows": [99]}', encoding="utf-8")  # of an earlier call
    run = gpu_run.Run(tmp_path, None, 20.0, started=time.monotonic())
    run.do([gpu_run.Job("long", "", _good, 30.0, 60.0)])
    run.do([gpu_run.Job("foreign", "", _good, 1.0, 60.0, ("no_such_package",))])
    run.do([gpu_run.Job("short", "", _good, 1.0, 60.0)])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["skipped"] == {"long": "no time left", "foreign": "no_such_package is not installed"}
    assert found["rows"] == [0] and run.exit_code() == 0


def test_a_summary_that_fails_loses_nothing(module: Callable[[str], Any], tmp_path: Path) -> None:
    gpu_run = module("gpu_run")
    run = gpu_run.Run(tmp_path, None, 60.0, started=time.monotonic(), summarize=lambda found: [found["nothing"]])
    run.do([gpu_run.Job("good", "", _good, 1.0, 60.0)])
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["rows"] == [0] and "KeyError" in found["errors"]["summary"] and run.exit_code() == 1


@pytest.mark.parametrize(("value", "shape"), [(math.nan, (3, 5)), (1.5, (3, 5)), (1.0, (1, 5))])
def test_what_is_no_number_or_too_far_is_wrong(
    module: Callable[[str], Any], value: float, shape: tuple[int, ...]
) -> None:
    compare, wrong = module("gpu_kernels").compare, list[str]()
    exact = {"dx": torch.ones(3, 5).double(), "dA_0": torch.ones(2, 2).double()}
    assert compare("right", [torch.ones(3, 5), torch.ones(2, 2)], exact, wrong.append) == 0 and not wrong
    got = torch.ones(shape)
    got.view(-1)[1] = value
    compare("other", [got, torch.ones(2, 2)], exact, wrong.append)
    assert len(wrong) == 1 and wrong[0].startswith("other: dx is off by")


def _dx_only(dx: Any, da: Any, db: Any) -> Any:
    return 2 * dx if not da else dx, da, db


CHANGES: dict[str, Callable[..., Any]] = {
    "dA_1": lambda dx, da, db: (dx, [*da[:1], *(-a for a in da[1:])], db),
    "dB_0": lambda dx, da, db: (dx, da, [*(b * math.nan for b in db[:1]), *db[1:]]),
    "dx": _dx_only,
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, module: Callable[[str], Any], part: str) -> None:
    gpu_kernels = module("gpu_kernels")
    able = gpu_kernels.able

    def changed(op: str, *rest: Any) -> Any:
        for candidate in able(op, *rest):
            run = candidate.run
            if op == "lora_linear_backward" and candidate.name == "library_gemm":
                candidate = dataclasses.replace(candidate, run=lambda *a, run=run: CHANGES[part](*run(*a)))
            yield candidate

    monkeypatch.setattr(gpu_kernels, "able", changed)
    wrong: list[str] = []
    gpu_kernels.check("cpu", [ODD], wrong.append)
    assert len(wrong) == 2 and wrong[1].split(": ")[0] == f"{wrong[0].split(': ')[0]} again"
    assert all("backward library_gemm" in line and f": {part} is off by" in line for line in wrong)


def test_an_empty_batch_is_compared_by_what_is_left(module: Callable[[str], Any]) -> None:
    gpu_kernels, wrong = module("gpu_kernels"), list[str]()
    errors = gpu_kernels.check("cpu", [(0, *ODD[1:])], wrong.append)
    assert wrong == [] and errors and not any(errors)
    zeros = torch.zeros(3, 2, dtype=torch.float64)
    assert gpu_kernels.error_of(torch.full((3, 2), 1e-3), zeros) > 1
    assert math.isnan(gpu_kernels.error_of(torch.full((3, 2), math.nan), zeros))


def test_a_candidate_that_raises_costs_only_its_own_numbers(
    monkeypatch: pytest.MonkeyPatch, module: Callable[[str], Any]
) -> None:
    gpu_kernels, gpu_linears = module("gpu_kernels"), module("gpu_linears")

    def run(*_: Any) -> Any:
        raise RuntimeError("misaligned address")

    def more(op: str, *rest: Any) -> Any:
        yield dataclasses.replace(first := next(able(op, *rest)), name="broken", run=run)
        yield first

    able = gpu_kernels.able
    for each in (gpu_kernels, gpu_linears):
        monkeypatch.setattr(each, "able", more)
    wrong: list[str] = []
    assert len(gpu_kernels.check("cpu", [ODD], wrong.append)) == 6 and len(wrong) == 6
    assert wrong[0] == "lora_linear broken M=5 N=(33, 17): RuntimeError: misaligned address"
    group, dense = gpu_kernels.group_of((33, 17), 96, "cpu")
    wrong.clear()
    rows = gpu_linears.linear_row("cpu", group, torch.cat(dense), 5, None, wrong.append)
    assert [row["op"] for row in rows] == ["lora_linear", "lora_linear_backward"] and len(wrong) == 2
    assert all(row["best"] in row["us"] and "broken" not in row["us"] and "bound" not in row for row in rows)


def _found() -> dict[str, Any]:
    """As a run on a GPU leaves it, in part."""
    gpu_models = importlib.import_module("gpu_models")
    profile = {"device_ms": 60.0, "launches": 2000}
    steps = {"ours": 0.08, "bitsandbytes": 0.1, "dense_lora": 0.07}
    alone = {"optimizer_s": 0.01, "optimizer_host_s": 0.004}
    training = {name: {"step_s": s} | ({"profile": profile} if name == "ours" else {}) for name, s in steps.items()}
    bound = {"bytes_us": 9.0, "operations_us": 0.1, "share": 1.2, "bound_by": "nothing known"}
    peaks = {"resident": 700.0, "paged": 500.0}
    return {
        "settings": {"tokens": [2, 2048]},
        "speeds": {"read": 4e12, "copy": 4e12, "operations": 8e14},
        "dequantize": [
            {"n": 8, "k": 9, "bytes": 100, "ours_us": 7.5, "of_copy_bandwidth": 1.25, "bound": bound},
            {"n": 9, "k": 8, "bytes": 100, "ours_us": 7.5, "of_copy_bandwidth": 0.8, "bound": bound | {"share": 0.8}},
        ],
        "model": {"layers": 8, "shape": gpu_models.LLAMA_3_8B, "training": training},
        "paging": {
            name: {"step_s": 1.0, "loss_last": 1.0, "peak_mb": mb, "state_mb": 280.0} | alone
            for name, mb in peaks.items()
        },
    }


def test_the_summary_knows_limits_and_bounds(module: Callable[[str], Any]) -> None:
    entries = {one["what"]: one for one in module("gpu_summary").summary(_found())}
    met = {what: one["met"] for what, one in entries.items() if one["limit"] is not None}
    assert met == {
        "dequantize 8x9, times the bandwidth of a copy, which is none if it can be beaten": True,
        "dequantize 9x8, part of the bandwidth of a copy": False,
        "training step of qlora-compile / dense bf16 LoRA (PEFT, fp32 adapters)": False,
        "training step of qlora-compile / bitsandbytes NF4 + PEFT (fp32 adapters, its default)": True,
        "paged optimizer's step / resident": True,
        "paged optimizer's peak / resident": True,
        "states / resident peak": True,
    }
    assert "so no bound" in entries[next(iter(met))]["bound"]
    assert "alone 10 ms (4 of the host's)" in entries["paged optimizer's step / resident"]["bound"]
    ours = entries["training step of qlora-compile, ms"]
    assert ours["measured"] == 80 and "bound by the host: the device works 60 of 80 ms, 2000 launches" in ours["bound"]
    # 4 T (8 x 218,103,808 + 525,336,576) + 7 T L H x 8 layers - 2 T x 25,165,824, T = 4096, at 800 Tflop/s
    assert "its 38.9 Tflop alone 48.64 ms, 0.61 of it" in ours["bound"]
