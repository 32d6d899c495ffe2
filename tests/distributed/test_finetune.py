"""`qlora-compile finetune` under torchrun: as one process, split or not; a killed process; another number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_compile.cli import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]
OPTIONS = (
    *(
        "--seq-len",
        11,
        "--lr",
        1e-3,
        "--compute-dtype",
        "float32",
        "--block-size",
        32,
        "--save-every",
        3,
        "--no-compile",
    ),
    *("--r", 3, "--device", "cpu"),
)


@pytest.fixture
def command(tiny_checkpoint: Path, tmp_path: Path) -> tuple[object, ...]:
    sentence = "the quick brown fox jumps over the lazy dog while seven wizards mix a jug of bad liquor"
    words = sentence.split()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words[(i * 5 + i // 11) % len(words)] for i in range(300)))
    return ("finetune", "--model", tiny_checkpoint, "--data", text, "--eval-data", text, *OPTIONS)


@pytest.fixture
def run(launch: Callable[..., Any]) -> Run:
    """`run(2, *arguments)`: the command line's program in two processes."""
    return lambda world, *args: launch(world, "-m", "qlora_compile.cli", *args)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, two: Path) -> None:
    # fp32, and AdamW: the mean of parts of a batch against that of the whole, divided by a gradient's size (lr 1e-3)
    assert losses(one) == pytest.approx(losses(two), abs=2e-4)
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3


def test_two_processes_are_one(run: Run, command: tuple[object, ...], tmp_path: Path) -> None:
    alone, split = tmp_path / "alone", tmp_path / "split"
    steps = ("--batch", 1, "--grad-accum", 2)
    process = run(2, *command, *steps, "--steps", 4, "--fsdp", "--optimizer", "paged_adamw", "--out", split, "--json")
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout)  # one answer, of the first process
    assert result["steps"] == 4 and len(losses(split)) == 4
    assert sorted(path.name for path in split.iterdir()) == ["adapter", "checkpoints", "metrics.jsonl", "run.json"]
    record = json.loads((split / "run.json").read_text())
    assert record["processes"] == 2 and record["status"] == "done"
    options = ("--batch", 2, "--grad-accum", 2, "--steps", 4, "--optimizer", "paged_adamw", "--out", alone)
    assert main([str(word) for word in (*command, *options)]) == 0
    assert_same(split, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--fsdp",), ("--compile", "--lowering", "aot_eager"), ("--fsdp", "--compile")]
)
def test_four_processes_are_one(
    options: tuple[str, ...], run: Run, command: tuple[object, ...], tmp_path: Path
) -> None:
    if "--fsdp" in options and "--compile" in options:
        options = (*options, "--lowering", "aot_eager")
    process = run(4, *command, "--batch", 1, "--grad-accum", 2, "--steps", 6, *options, "--out", tmp_path / "four")
    assert process.returncode == 0, process.stderr[-4000:]
    process = run(1, *command, "--batch", 4, "--grad-accum", 2, "--steps", 6, "--out", tmp_path / "alone")
    assert process.returncode == 0, process.stderr[-4000:]
    assert_same(tmp_path / "four", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fsdp",), ("--fsdp", "--compile", "--lowering", "aot_eager")])
def test_a_killed_process_ends_all_and_the_run_goes_on(
    options: tuple[str, ...],
    run: Run,
    torchrun: Callable[..., list[str]],
    command: tuple[object, ...],
    tmp_path: Path,
) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    base = (*command, "--batch", 1, "--schedule", "constant", "--warmup", 0, "--out", out, *options)
    job = subprocess.Popen(
        torchrun(2, "-m", "qlora_compile.cli", *base, "--steps", 5000), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or len(losses(out)) < 7:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(rank_of(job.pid, 1), signal.SIGKILL)
    _, stderr = job.communicate(timeout=90)
    assert job.returncode != 0
    [said] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "Process 0 of 2 lost process 1" in said and "--resume" in said, stderr[-4000:]
    assert "exitcode  : 1 " in stderr, "the survivor was ended before it could end itself"
    stored = sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))
    assert stored
    total = stored[-1] + 3
    process = run(2, *base, "--steps", total, "--resume")
    assert process.returncode == 0, process.stderr[-4000:]
    straight = (*command, "--batch", 2, "--schedule", "constant", "--warmup", 0, "--out", alone, "--steps", total)
    process = run(1, *straight)
    assert process.returncode == 0, process.stderr[-4000:]
    assert len(losses(out)) == total
    assert losses(out) == pytest.approx(losses(alone), abs=1e-3)


def rank_of(parent: int, rank: int) -> int:
    """The process of that rank among torchrun's children."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank} among {children}")


@pytest.mark.slow
def test_what_is_wrong_on_the_first_is_said_by_all(run: Run, command: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "something.txt").write_text("")
    process = run(2, *command, "--steps", 2, "--out", out)
    assert process.returncode != 0
    assert process.stderr.count("error: The output folder") >= 2, process.stderr[-4000:]


EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_distributed.py"


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["torchrun", "accelerate"])
@pytest.mark.parametrize("options", [(), ("--fsdp",)])
def test_the_example_under_both_starters(
    starter: str, options: tuple[str, ...], launch: Callable[..., Any], wide_checkpoint: Path, tmp_path: Path
) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox jumps over the lazy dog while seven wizards mix a jug of bad liquor " * 8)
    args = ["--model", wide_checkpoint, "--data", data, "--out", tmp_path / "adapter", "--cpu", *options]
    args += ["--seq-len", 12, "--steps", 4, "--lowering", "aot_eager", "--lr", 1e-2, "--r", 4]
    if starter == "torchrun":
        process = launch(2, EXAMPLE, *args)
    else:
        # accelerate starts one process only where it is told of CPUs; this is its starter of several
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
        start += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", EXAMPLE, *args]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(list(map(str, start)), env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "2 processes" in process.stdout
    found = [float(line.split()[-1]) for line in process.stdout.splitlines() if line.startswith("step ")]
    assert len(found) == 4 and found[-1] < found[0]
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def wide_checkpoint(
    tiny_llama: Callable[..., Any], tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama with rows that are whole blocks of 64, and the other's tokenizer."""
    path = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_checkpoint, path)
    tiny_llama(
        torch.bfloat16, hidden_size=128, intermediate_size=192, head_dim=32, num_attention_heads=4
    ).save_pretrained(path)
    return path
