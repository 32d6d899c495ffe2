"""Checkpoint folders: whole or not there, verified when read, the last K kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.errors import CheckpointError, OutputError
from qlora_compile.runtime import checkpoint as ck

TENSORS = {
    "parameters": {"a/b": torch.arange(15, dtype=torch.float32).view(3, 5).t(), "c": torch.tensor(2.5)},
    "rng": {"cpu": torch.arange(7, dtype=torch.uint8)},
}
STATE: dict[str, Any] = {"position": 12, "scale": 65536.0, "nested": {"x": [1, None]}}


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    path = ck.save_checkpoint(tmp_path / "checkpoints", 7, TENSORS, STATE)
    assert path.name == "step-7" and [p.name for p in path.parent.iterdir()] == ["step-7"]
    found = ck.load_checkpoint(path)
    assert (found.step, found.state) == (7, STATE)
    for group, tensors in TENSORS.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[group][name], tensor) and found.tensors[group][name].dtype == tensor.dtype


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    ck.save_checkpoint(tmp_path, 7, TENSORS, STATE)
    ck.save_checkpoint(tmp_path, 7, {"rng": TENSORS["rng"]}, {"position": 1})
    found = ck.load_checkpoint(tmp_path / "step-7")
    assert found.state == {"position": 1} and set(found.tensors) == {"rng"}


@pytest.mark.parametrize("name", ["parameters.safetensors", "rng.safetensors", "state.json"])
def test_a_flipped_bit_or_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = ck.save_checkpoint(tmp_path, 3, TENSORS, STATE)
    flip_a_byte(path / name)
    with pytest.raises(CheckpointError, match=rf"{name} is corrupt"):
        ck.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        ck.load_checkpoint(path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"", "corrupt"),
        (b"\xff\xfe", "corrupt"),
        (b"[]", "not a JSON object"),
        pytest.param(b"[" * 100_000, "corrupt", id="too deep"),
        (b"{}", "format None"),
        (b'{"format": 9}', "format 9"),
        (b'{"format": 1, "step": 1, "sha256": {}}', "not a checkpoint's manifest"),
    ],
)
def test_a_broken_manifest_is_refused(tmp_path: Path, manifest: bytes, message: str) -> None:
    path = ck.save_checkpoint(tmp_path, 3, TENSORS, STATE)
    (path / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match=message):
        ck.load_checkpoint(path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = ck.save_checkpoint(tmp_path, 3, TENSORS, STATE)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["../../secret.safetensors"] = "0"
    del manifest[ck.OWN_SUM]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="lacks"):
        ck.load_checkpoint(path)


def test_the_newest_valid_one_is_used_and_the_damaged_set_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12, 100):
        ck.save_checkpoint(tmp_path, step, TENSORS, STATE | {"position": step})
    flip_a_byte(tmp_path / "step-100" / "parameters.safetensors")
    (tmp_path / "step-12" / "manifest.json").unlink()
    said: list[str] = []
    found = ck.load_newest(tmp_path, said.append)
    assert found is not None and found.step == 8 and found.state["position"] == 8
    assert len(said) == 2 and "step-100" in said[0] and "step-12" in said[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-100.set-aside", "step-12.set-aside", "step-4", "step-8"]
    # The damaged ones are not counted among the last two.
    ck.save_checkpoint(tmp_path, 9, TENSORS, STATE)
    ck.prune(tmp_path, keep_last=2)
    assert [p.name for p in ck.list_checkpoints(tmp_path)] == ["step-8", "step-9"]


def test_one_that_the_check_refuses_is_set_aside_too(tmp_path: Path) -> None:
    for step in (4, 8):
        ck.save_checkpoint(tmp_path, step, TENSORS, STATE | {"position": step})

    def check(checkpoint: ck.Checkpoint) -> None:
        if checkpoint.state["position"] == 8:
            raise CheckpointError("8 is not whole.")

    said: list[str] = []
    found = ck.load_newest(tmp_path, said.append, check)
    assert found is not None and found.step == 4 and said == ["8 is not whole. Skipped it; trying the one before."]
    assert (tmp_path / "step-8.set-aside").is_dir()


def test_none_there_and_none_valid_are_different_things(tmp_path: Path) -> None:
    assert ck.load_newest(tmp_path / "nothing", print) is None
    flip_a_byte(ck.save_checkpoint(tmp_path, 3, TENSORS, STATE) / "state.json")
    for _ in range(2):  # the second time nothing but the folder that was set aside is there
        with pytest.raises(CheckpointError, match=r"All 1 checkpoints in .* are damaged"):
            ck.load_newest(tmp_path, lambda message: None)


def test_a_manifest_vouches_for_itself(tmp_path: Path) -> None:
    path = ck.save_checkpoint(tmp_path, 8, TENSORS, STATE)
    manifest = path / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"step": 8', '"step": 9'))
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in it"):
        ck.load_checkpoint(path)
    earlier = {name: value for name, value in json.loads(whole).items() if name != ck.OWN_SUM}
    manifest.write_text(json.dumps(earlier))  # of a version that wrote no sum of it
    assert ck.load_checkpoint(path).step == 8
    manifest.write_text(json.dumps(earlier | {"step": 9}))
    with pytest.raises(CheckpointError, match="its manifest is of step 9"):
        ck.load_checkpoint(path)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100, 2):
        ck.save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "step-abc").mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert [p.name for p in ck.list_checkpoints(tmp_path)] == ["step-2", "step-9", "step-10", "step-100"]


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ck.save_checkpoint(tmp_path, 1, TENSORS, STATE)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(OutputError, match="disk is full"):
        ck.save_checkpoint(tmp_path, 2, TENSORS, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


WRITER = """
import sys, torch
from pathlib import Path
from qlora_compile.runtime import checkpoint as ck
folder = Path(sys.argv[1])
print("ready", flush=True)
for step in range(1, 10_000):
    ck.save_checkpoint(folder, step, {"p": {"w": torch.full((300, 1000), float(step))}}, {"position": step})
    ck.prune(folder, 2)
    print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    for round_ in range(6):
        folder = tmp_path / str(round_)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        done = 0
        for _ in range(3 + round_):
            done = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        done = int((process.stdout.read().split() or [done])[-1])
        process.wait()
        said: list[str] = []
        found = ck.load_newest(folder, said.append)
        # One more may have been renamed into place before it was printed.
        assert found is not None and found.step in (done, done + 1) and said == []
        assert torch.equal(found.tensors["p"]["w"], torch.full((300, 1000), float(found.step)))
        assert all(p.name.startswith("step-") for p in folder.iterdir())
