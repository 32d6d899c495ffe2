"""What each job of gpu.py does, in a process of its own: it measures, prints and keeps, row by row."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import gpu_copies
import gpu_kernels
import gpu_linears
import gpu_models
import gpu_paging
import gpu_profile
import gpu_timeline
import torch
from bounds import Speeds, explained
from common import machine
from gpu_run import Child, say, write_atomically
from gpu_timing import launch_times

from qlora_compile.runtime.kernels import devices, tuning

GROUPS = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))  # of Llama-3-8B
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROW_S = 10.0  # no row of the table is begun with less time


@dataclass(frozen=True)
class Settings:
    """What the command line says; `tokens` is batch and length."""

    device: str
    small: bool
    parts: tuple[str, ...]
    layers: int | None
    tokens: tuple[int, int]

    @property
    def shape(self) -> gpu_models.Shape:
        return gpu_models.SMALL if self.small else gpu_models.LLAMA_3_8B

    def model_layers(self) -> int:
        """As asked, or what fits, of 32: the models of a group, side by side, take 15 GB and 4.5 for each layer."""
        if self.layers is not None or self.small or self.device != "cuda":
            return self.layers or (2 if self.small else 1)
        return max(1, min(8, int((torch.cuda.mem_get_info()[1] - 15e9) / 4.5e9)))


class Wrongs:
    """Lines of what is wrong, kept as they come."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        say("WRONG", line)
        self.child.keep(wrong=self.lines)


def tried(child: Child, what: str, call: Callable[[], Any]) -> Any:
    """What the call returns; None where it raises, which is kept and makes the exit code 1, and costs nothing else."""
    try:
        return call()
    except Exception:  # noqa: BLE001  # kept in the job's file
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        child.keep(errors=child.kept.get("errors", {}) | {what: traceback.format_exc()})
        return None


def check(child: Child) -> None:
    """All kernels against fp64 and their references."""
    settings = child.settings
    timed = settings.device == "cuda" and not settings.small
    errors = gpu_kernels.check(
        settings.device, (*gpu_kernels.ODD, *(gpu_kernels.TIMED if timed else ())), Wrongs(child)
    )
    worst = max(errors, key=lambda error: (math.isnan(error), error), default=math.nan)
    child.keep(checks={"compared": len(errors), "largest_error": worst})


def speeds(child: Child) -> None:
    """The device's name and speeds; where kernels are asked for, dequantize beside a copy."""
    child.turn()
    device, small = child.settings.device, child.settings.small
    child.keep(machine=tuning.about(device))
    measured = gpu_linears.measured_speeds(device, small)
    child.keep(speeds=asdict(measured))
    products = f"bf16 products {measured.operations / 1e12:,.1f} TFLOP/s"
    say(f"read {measured.read / 1e9:,.0f} GB/s, copy {measured.copy / 1e9:,.0f} GB/s, {products}")
    launch = launch_times(device)
    child.keep(launch=launch)
    say("a kernel that does nothing: " + ", ".join(f"{name} {us:.1f}" for name, us in launch.items()))
    link = tried(child, "link", lambda: gpu_copies.link_speeds(device)) or {}
    child.keep(link=link)
    for way, speed in link.items():
        say(f"pinned memory, {way}: {speed / 1e9:.1f} GB/s")
    rows, wrong = list[dict[str, Any]](), Wrongs(child)
    for n, k in ((96, 160), (33, 96)) if small else SHAPES:
        if "kernels" in child.settings.parts:
            call = functools.partial(gpu_linears.dequantize_row, device, n, k, measured, wrong)
            row = gpu_kernels.guarded(f"dequantize {n}x{k}", device, wrong, call)
            rows += [] if row is None else [row]
            child.keep(dequantize=rows)
    child.keep(machine=machine() | tuning.about(device))  # asks bitsandbytes, which takes a while


def linears(rows_of_x: Sequence[int], child: Child) -> None:
    """Rows of the linear table for these numbers of rows of x, and the dispatch table of all rows so far."""
    settings, wrong = child.settings, Wrongs(child)
    device = settings.device
    made = [gpu_kernels.group_of(sizes, k, device) for sizes, k in ((((64, 32), 96),) if settings.small else GROUPS)]
    rows: list[dict[str, Any]] = []
    if not settings.small:
        for m, (group, dense) in itertools.product(rows_of_x, made):  # compiles; what is wrong is said when it is timed
            gpu_linears.linear_row(device, group, torch.cat(dense), m, None, lambda line: None, gpu_linears.once)
    child.turn()
    known = Speeds(**child.found["speeds"]) if "speeds" in child.found else None
    for m in rows_of_x:
        for group, dense in made:
            name = f"linears, M={m} N={group.out_features}"
            if child.left() < ROW_S:
                say(f"not measured: {name}: no time left")
                child.keep(skipped=child.kept.get("skipped", {}) | {name: "no time left"})
                continue
            call = functools.partial(gpu_linears.linear_row, device, group, torch.cat(dense), m, known, wrong)
            more = gpu_kernels.guarded(name, device, wrong, call) or []
            rows += more
            child.keep(linear=rows)
            for row in more:
                show_row(row)
        keep_table(child, [*child.found.get("linear", []), *rows])
    if 1 in rows_of_x:
        chained(child, wrong)


def chained(child: Child, wrong: Wrongs) -> None:
    """One token's linears, one after the other on weights of their own."""
    device, rows = child.settings.device, list[dict[str, Any]]()
    for sizes, k in (((64, 32), 96),) if child.settings.small else GROUPS:
        if child.left() < ROW_S:
            say("not measured: more linears one after the other: no time left")
            return
        call = functools.partial(gpu_linears.chained_row, device, sizes, k, wrong)
        row = tried(child, f"linears one after the other N={sizes}", call)
        if row is not None:
            rows.append(row)
            child.keep(chained=rows)
            times = ", ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
            say(f"{row['count']} linears one after the other, M=1 N={row['n']} K={k}, us each: {times}")


def show_row(row: dict[str, Any]) -> None:
    times = ", ".join(f"{name} {us:,.0f}" for name, us in row["us"].items())
    say(f"{row['op']} M={row['m']} N={row['n']} K={row['k']}: dense bf16 {row['dense_bf16_us']:,.0f} us; {times}")
    if "bound" in row:
        say(f"    {row['best']}: {explained(row['bound'])}")


def keep_table(child: Child, rows: list[dict[str, Any]]) -> None:
    """The dispatch table to ship, and this machine's own: the models of later jobs run by what was measured."""
    device = child.settings.device
    entries = gpu_linears.table_entries(rows, device)
    versions = {package: metadata.version(package) for package in ("torch", "triton")}
    facts = tuning.about(device) | {"versions": versions, "date": time.strftime("%Y-%m-%d")}
    body = {"about": facts, "entries": [entry._asdict() for entry in entries]}
    write_atomically(child.file.parents[1] / f"table-{devices.kind(device)}.json", body)
    if not child.settings.small:
        tuning.remember(entries, device)


def contender(name: str, decodes: bool, child: Child) -> None:
    """Training, where its time goes, decoding: of one contender."""
    settings = child.settings
    device, shape, layers, small = settings.device, settings.shape, settings.model_layers(), settings.small
    found: dict[str, Any] = {
        "layers": layers,
        "tokens": settings.tokens,
        "shape": shape,
        "training": {},
        "decoding": {},
    }
    model = gpu_models.made(name, shape, layers, device)
    step = gpu_models.training_step(name, model, shape, settings.tokens, device)
    result = found["training"][name] = gpu_models.timed_steps(step, device, 2 if small else 8, child.turn)
    child.keep(model=found)
    say(f"training {name}: {numbers(result)}")
    result["profile"] = gpu_profile.on_device(step, device)
    child.keep(model=found)
    result["profile"] |= gpu_profile.in_python(step)
    child.keep(model=found)
    say(f"    {numbers(result['profile'])}")
    if decodes:
        found["decoding"][name] = gpu_models.decoding(model, shape, device, 4 if small else 64)
        child.keep(model=found)
        say(f"decoding {name}: {numbers(found['decoding'][name])}")


def paging(name: str, child: Child) -> None:
    """Training with the optimizer's states resident, or paged; where a paged optimizer's step goes."""
    device, small = child.settings.device, child.settings.small
    shape, layers = (gpu_models.SMALL, 2) if small else (gpu_paging.NARROW, gpu_paging.LAYERS)
    found, step, optimizer = gpu_paging.run(name, shape, layers, device, 2 if small else 12, child.turn)
    child.keep(paging={name: found})
    found["profile"] = gpu_profile.on_device(step, device)
    child.keep(paging={name: found})
    say(f"{name}: {numbers(found)}; {numbers(found['profile'])}")
    if name != "paged":
        return
    found["timeline"] = tried(child, "timeline", lambda: looked_at(child, "paged", step, optimizer))
    child.keep(paging={name: found})
    found["all_there"] = tried(child, "all_there", lambda: gpu_paging.all_there(step, optimizer, device))
    child.keep(paging={name: found})
    say(f"    without a budget: {found['all_there']}")


def looked_at(child: Child, name: str, step: gpu_models.Step, optimizer: Any) -> dict[str, Any]:
    """The timeline of one `optimizer.step()`, and what it says."""
    trace = gpu_timeline.traced(optimizer, step, child.settings.device)
    found = gpu_timeline.timeline(gpu_timeline.spans(trace))
    found["reading"] = gpu_timeline.reading(found, child.found.get("link", {}))
    for kind in gpu_timeline.KINDS:
        if kind in found:
            say(f"    {name}, {kind}: {numbers(found[kind])}; largest gaps {found[kind]['largest_gaps']}")
    say(f"READING of {name}: {found['reading']}")
    return found


def optimizer_alone(connections: int | None, child: Child) -> None:
    """The paged optimizer without a model: streams that copy at two priorities; beside them a bare loop that moves the same
    pages. `connections`: CUDA_DEVICE_MAX_CONNECTIONS, which a process has to have from its start."""
    if connections is not None:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    device, small = child.settings.device, child.settings.small
    shape, layers = (gpu_models.SMALL, 2) if small else (gpu_paging.NARROW, gpu_paging.LAYERS)
    label = "" if connections is None else f"{connections} connections, "
    gpu_paging.alone(device, shape, layers)[0]()  # compiles
    child.turn()
    found: dict[str, Any] = {}

    def measured(name: str, priority: int) -> dict[str, Any]:
        step, optimizer = gpu_paging.alone(device, shape, layers, priority)
        for _ in range(gpu_models.WARM_UP):
            step()
        times: dict[str, Any] = gpu_paging.optimizer_times(step, optimizer, device)
        return times | {"timeline": tried(child, f"{name}: timeline", lambda: looked_at(child, name, step, optimizer))}

    for priority in (0, -1):
        name = f"{label}priority {priority}"
        found[name] = tried(child, name, functools.partial(measured, name, priority))
        child.keep(optimizer_alone=found)
        say(f"optimizer alone, {name}: {numbers(found[name] or {})}")
    if device == "cuda":
        piece = 1 << 16 if small else gpu_copies.PIECE
        for layout, priority in itertools.product(gpu_copies.LAYOUTS[1:], (0, -1)):
            name = f"{label}bare loop{layout}, priority {priority}"
            found[name] = tried(child, name, functools.partial(gpu_copies.bare_loop, layout, priority, piece))
            child.keep(optimizer_alone=found)
            say(f"{name}: {numbers(found[name] or {})}")


def numbers(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, (int, float)))
