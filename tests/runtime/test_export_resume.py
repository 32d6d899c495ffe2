"""A killed export goes on from its finished shards, and only where everything that decides the bytes is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.errors import CheckpointError, ConfigError, OutputError
from qlora_compile.runtime import export_gguf, export_write
from qlora_compile.runtime.export import export

from .gguf_models import save_family

MakeAdapter = Callable[..., Path]
KILLED = """
import os, signal, sys
from qlora_compile.runtime.export import export
def progress(done, total):
    if done > total * 0.6:
        os.kill(os.getpid(), signal.SIGKILL)
export(sys.argv[1], sys.argv[2], {sys.argv[3]: 0.5}, max_shard_size="20KB", report=True, resume=True, progress=progress)
"""


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_after_a_kill(tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, str(tiny_checkpoint), str(out), str(adapter)], env=os.environ)
    assert run.returncode == -signal.SIGKILL and not out.exists()
    partial = tmp_path / ".out.partial"
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert kept
    seen: list[int] = []
    options: dict[str, Any] = {"max_shard_size": "20KB", "report": True}
    result = export(
        tiny_checkpoint, out, {adapter: 0.5}, resume=True, progress=lambda done, _: seen.append(done), **options
    )
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not partial.exists() and seen[-1] == result.total_bytes and seen == sorted(seen)
    whole = export(tiny_checkpoint, tmp_path / "whole", {adapter: 0.5}, **options)
    assert contents(out) == contents(tmp_path / "whole")
    assert result.layers == whole.layers and result.files == whole.files


@pytest.mark.parametrize("change", ["weight", "adapter", "base", "dtype"])
def test_other_inputs_start_over(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    adapter = make_adapter(tmp_path / "adapter", load(base))
    options: dict[str, Any] = {"max_shard_size": "20KB", "resume": True}

    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="disk is full"):
        export(base, tmp_path / "out", {adapter: 0.5}, progress=stop, **options)
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    weight, dtype = 0.5, None
    if change == "weight":
        weight = 0.25
    elif change == "adapter":
        shutil.rmtree(adapter)
        make_adapter(adapter, load(base), seed=7)
    elif change == "base":
        other = load(base).to(torch.bfloat16)
        other.model.norm.weight.data.mul_(1.5)
        other.save_pretrained(base)
    else:
        dtype = "float16"
    export(base, tmp_path / "out", {adapter: weight}, dtype=dtype, **options)
    export(base, tmp_path / "whole", {adapter: weight}, dtype=dtype, max_shard_size="20KB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Killed(BaseException):
    """Nothing catches it, as nothing catches a signal."""


@pytest.mark.parametrize("when", [0.2, 0.6, 0.97])
def test_4_bits_go_on_from_the_weights_and_shards_that_are_finished(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, when: float
) -> None:
    """A kill while weights are quantized (0.2, 0.6), and while shards are written."""
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint), targets=("q_proj", "down_proj", "embed_tokens"))
    options: dict[str, Any] = {"max_shard_size": "9KB", "report": True, "format": "nf4", "correction_rank": 2}
    with pytest.raises(Killed):
        export(tiny_checkpoint, tmp_path / "out", adapter, resume=True, progress=killing_at(when), **options)
    assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
    quantized: list[str] = []
    once = export_write._quantize_one
    monkeypatch.setattr(
        export_write, "_quantize_one", lambda job, key, *rest: quantized.append(key) or once(job, key, *rest)
    )
    seen: list[int] = []
    result = export(
        tiny_checkpoint, tmp_path / "out", adapter, resume=True, progress=lambda done, _: seen.append(done), **options
    )
    assert len(quantized) == {0.2: 15, 0.6: 4, 0.97: 0}[when] and seen == sorted(seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    whole = export(tiny_checkpoint, tmp_path / "whole", adapter, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert contents(tmp_path / "out" / "correction") == contents(tmp_path / "whole" / "correction")
    assert (result.layers, result.corrected, result.files) == (whole.layers, whole.corrected, whole.files)


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_a_gguf_file_goes_on_from_its_finished_tensors(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("gguf")
    base = save_family(tmp_path / "base", "Llama")
    adapter = make_adapter(tmp_path / "adapter", load(base))
    options: dict[str, Any] = {"report": True, "format": "gguf", "dtype": "q8_0"}
    monkeypatch.setattr(export_gguf, "NOTE_EVERY_BYTES", 40_000)
    with pytest.raises(Killed):
        export(base, tmp_path / name, adapter, resume=True, progress=killing_at(0.7), **options)
    with open(tmp_path / f".{name}.partial" / ("out.gguf" if name == "out.gguf" else "model.gguf"), "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"?" * 2000)  # of the tensor that was being written
    seen: list[int] = []
    result = export(base, tmp_path / name, adapter, resume=True, progress=lambda done, _: seen.append(done), **options)
    assert 0.1 < seen[0] / seen[-1] < 0.7 and seen[-1] == result.total_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", name]
    whole = export(base, tmp_path / "whole.gguf", adapter, **options)
    written = tmp_path / name / "model.gguf" if name == "out" else tmp_path / name
    assert written.read_bytes() == (tmp_path / "whole.gguf").read_bytes() and result.layers == whole.layers


def killing_at(part: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > total * part:
            raise Killed

    return progress


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_what_another_program_wrote_meanwhile_stays(tmp_path: Path, name: str, resume: bool) -> None:
    base, out = save_family(tmp_path / "base", "Qwen2"), tmp_path / name
    options: dict[str, Any] = {"resume": resume, "format": "gguf" if name.endswith("gguf") else "safetensors"}
    precious = out if name.endswith("gguf") else out / "precious.txt"

    def write(done: int, total: int) -> None:
        precious.parent.mkdir(exist_ok=True)
        precious.write_text("x")

    with pytest.raises(OutputError, match="meanwhile and is left as it is; the result lies in") as caught:
        export(base, out, progress=write, **options)
    beside = Path(str(caught.value).rpartition(" lies in ")[2].removesuffix("."))
    assert precious.read_text() == "x" and sorted(tmp_path.iterdir()) == sorted([base, out, beside])
    whole = tmp_path / f"whole{out.suffix}"
    export(base, whole, **options)
    assert contents(beside) == contents(whole) if beside.is_dir() else beside.read_bytes() == whole.read_bytes()


def test_where_there_is_nothing_to_go_on_from(tmp_path: Path, tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match="resume needs a base in a folder"):
        export(tiny_llama(), tmp_path / "out", resume=True)
    with pytest.raises(CheckpointError, match=r"There is no (checkpoint at|model folder or \.gguf file)"):
        export(tmp_path / "nowhere", tmp_path / "out", resume=True)
