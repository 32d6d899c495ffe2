"""Where a paged optimizer's step goes: the parts of benchmarks/gpu.py that need a GPU, on one that is not there."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one of the script's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.waited = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 2.0  # ms


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.priority = priority

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        event.waited += 1

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Torch:
    """torch, whose GPU does everything at once, on the CPU."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda: Stream(),
            synchronize=lambda: None,
        )

    def empty(self, *size: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def cuda(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Torch()
    for name in ("gpu_copies", "gpu_timing"):
        monkeypatch.setattr(module(name), "torch", fake)
    monkeypatch.setattr(module("gpu_timing"), "flush", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())


def test_the_links_speeds(module: Callable[[str], Any], cuda: None) -> None:
    copies = module("gpu_copies")
    found = copies.link_speeds("cuda", 2 * copies.EXTENT // 8)
    assert set(found) == {f"{w}{layout}" for w in ("to_device", "to_host", "both") for layout in copies.LAYOUTS}
    assert all(speed == 2 * copies.EXTENT // 8 / 2e-3 for speed in found.values())
    assert copies.link_speeds("cpu") == {}


@pytest.mark.parametrize("layout", ["_by_pieces", "_from_extents"])
def test_a_bare_loop_moves_every_page(
    module: Callable[[str], Any], cuda: None, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    copies, kept = module("gpu_copies"), list[list[torch.Tensor]]()
    real = copies.pinned
    monkeypatch.setattr(copies, "pinned", lambda *given: kept.append(real(*given)) or kept[-1])
    found = copies.bare_loop(layout, -1, piece=4096, rounds=2)
    assert found["ms"] >= found["host_ms"] > 0 and found["bytes_per_s"] > 0
    assert [len(page) for page in kept[0]] == [4096] * copies.PAGES
    assert all(bool((page == 3).all()) for page in kept[0])  # once a round, and once to warm up


def event(cat: str, name: str, ts: float, dur: float, correlation: int, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "args": arguments | {"correlation": correlation},
    }


def trace(late: bool = False, wait_us: float = 0.0, kernel_us: float = 5.0, bytes_per_us: int = 25_000) -> Any:
    """Four pages of 100 us each way and three kernels; the host queues all at 1000 us, or each page when it can come."""
    events, at = [{"ph": "M", "name": "process_name"}], 1010.0
    for page in range(4):
        queued = 1000.0 + page if not late else at - 2
        size = 100 * bytes_per_us
        events.append(event("cuda_runtime", "cudaMemcpyAsync", queued, 1, page))
        events.append(
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", at, 100, page, stream=13, bytes=size),
        )
        events.append(
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", at + 50, 100, 10 + page, stream=14, bytes=size)
        )
        at += 100 + wait_us
    events.append(event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1005.0, 2, 90, stream=7, bytes=800))  # a table
    events += [event("kernel", "paged_step", 1020 + 100 * i, kernel_us, 20 + i, stream=7) for i in range(3)]
    return {"traceEvents": events}


def test_a_timeline(module: Callable[[str], Any]) -> None:
    timeline = module("gpu_timeline")
    found = timeline.timeline(timeline.spans(trace(wait_us=10.0)))
    coming = found["to_device"]
    assert (coming["count"], coming["median_us"], coming["busy_us"], coming["streams"]) == (4, 100, 400, [13])
    assert (coming["waiting_us"], coming["host_late_us"]) == (30, 0) and coming["bytes_per_s"] == 25e9
    assert coming["largest_gaps"] == [{"us": 10, "host_late": False}] * 3
    assert found["kernel"]["count"] == 3 and found["kernel"]["median_us"] == 5
    assert found["both_us"] == 4 * 50 + 3 * 40  # a page leaves while its own second half comes, and the next
    assert found["whole_us"] == 10 + 50 + 430
    late = timeline.timeline(timeline.spans(trace(late=True, wait_us=10.0)))
    assert (late["to_device"]["waiting_us"], late["to_device"]["host_late_us"]) == (0, 30)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "copies fill the time at 25.0 GB/s, bare pieces at 26.0: the link is the bound"),
        ({"bytes_per_us": 12_000}, "at 12.0 GB/s, bare pieces at 26.0: pages or pins are slow, not the link"),
        ({"late": True, "wait_us": 300.0}, "the host queues too late"),
        ({"wait_us": 300.0}, "copies wait though the host is ahead"),
        ({"kernel_us": 5000.0}, "the kernel is slow"),
    ],
)
def test_what_a_timeline_says(module: Callable[[str], Any], options: dict[str, Any], said: str) -> None:
    timeline = module("gpu_timeline")
    found = timeline.timeline(timeline.spans(trace(**options)))
    assert said in timeline.reading(found, {"both_by_pieces": 26e9, "to_device_by_pieces": 50e9})


def test_a_trace_without_a_gpu_says_nothing(module: Callable[[str], Any]) -> None:
    timeline, parameter = module("gpu_timeline"), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter])
    parameter.grad = torch.ones(3)
    found = timeline.timeline(timeline.spans(timeline.traced(optimizer, optimizer.step, "cpu")))
    assert found == {"whole_us": 0.0} and "nothing to read" in timeline.reading(found, {})
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def child_of(module: Callable[[str], Any], tmp_path: Path, device: str) -> Any:
    gpu_run, gpu_jobs = module("gpu_run"), module("gpu_jobs")
    (tmp_path / "parts").mkdir()
    settings = gpu_jobs.Settings(device, True, ("paging",), None, (2, 16))
    signal = SimpleNamespace(is_set=lambda: True)
    return gpu_run.Child(settings, {"link": {}}, tmp_path / "parts" / "job.json", math.inf, 60.0, signal, None)


def test_an_optimizer_alone_and_what_fails_costs_nothing_else(
    module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, child = module("gpu_jobs"), child_of(module, tmp_path, "cpu")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "")
    real, calls = jobs.gpu_timeline.traced, list[int]()

    def traced(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUPTI is busy")
        return real(*given)

    monkeypatch.setattr(jobs.gpu_timeline, "traced", traced)
    jobs.optimizer_alone(32, child)
    kept = json.loads(child.file.read_text(encoding="utf-8"))
    first, second = (kept["optimizer_alone"][f"32 connections, priority {p}"] for p in (0, -1))
    assert list(kept["errors"]) == ["32 connections, priority 0: timeline"] and first["timeline"] is None
    assert "reading" in second["timeline"]
    for times in (first, second):
        assert 0 < times["optimizer_host_s"] <= times["optimizer_stream_s"] <= times["optimizer_s"]
    assert jobs.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    lines = [module("limits").line(one) for one in module("gpu_summary").paged_steps(kept)]
    assert len(lines) == 2 and lines[0].startswith("paged optimizer alone, 32 connections, priority 0, ms: ")


def test_a_bare_loop_stands_beside_it(
    module: Callable[[str], Any], cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, child = module("gpu_jobs"), child_of(module, tmp_path, "cuda")
    alone = jobs.gpu_paging.alone
    monkeypatch.setattr(jobs.gpu_paging, "alone", lambda device, *rest: alone("cpu", *rest))
    monkeypatch.setattr(jobs.gpu_timeline, "traced", lambda *given: trace())
    jobs.optimizer_alone(None, child)
    kept = json.loads(child.file.read_text(encoding="utf-8"))
    loops = {name for name in kept["optimizer_alone"] if name.startswith("bare loop")}
    assert "errors" not in kept and len(loops) == 4 and "bare loop_from_extents, priority -1" in loops
    assert len([*module("gpu_summary").paged_steps(kept)]) == 6


def test_streams_get_their_priority(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    paging, seen = module("gpu_paging"), list[Any]()
    real = paging.qc.PagedAdamW

    def made(*args: Any, **options: Any) -> Any:
        seen.append(torch.cuda.Stream("cuda").priority)  # as CudaStreams does
        return real(*args, **options)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(paging.qc, "PagedAdamW", made)
    paging.alone("cpu", module("gpu_models").SMALL, 1, -1)
    assert seen == [-1] and torch.cuda.Stream is Stream


def test_without_a_budget_nothing_is_copied(module: Callable[[str], Any]) -> None:
    paging = module("gpu_paging")
    step, optimizer = paging.alone("cpu", module("gpu_models").SMALL, 1)
    step()
    assert optimizer.statistics().moved_out_bytes > 0
    step()
    paging.all_there(step, optimizer, "cpu")
    before = paging.moved_mb(optimizer)
    step()
    assert paging.moved_mb(optimizer) == before


def test_linears_one_after_the_other(module: Callable[[str], Any]) -> None:
    linears, wrong = module("gpu_linears"), list[str]()
    row = linears.chained_row("cpu", (33, 17), 96, wrong.append, count=3)
    assert not wrong and row["count"] == 3 and len(row["us"]) > 1 and all(us > 0 for us in row["us"].values())
    best = min((name for name in row["us"] if name != "dense_bf16"), key=row["us"].__getitem__)
    single = {"op": "lora_linear", "m": 1, "n": [33, 17], "k": 96, "us": {best: 7.0}, "bound": {"bytes_us": 1.0}}
    [entry] = module("gpu_summary").one_token({"chained": [row], "linear": [single]})
    assert entry["measured"] == row["us"][best] and "alone in a graph 7.0, its bytes 1.0" in entry["bound"]
