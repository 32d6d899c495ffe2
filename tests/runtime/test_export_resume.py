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

from qlora_compile.errors import ConfigError, OutputError
from qlora_compile.runtime.export import export

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


def test_where_there_is_nothing_to_go_on_from(tiny_checkpoint: Path, tmp_path: Path, tiny_llama: Any) -> None:
    for source, options in ((tiny_checkpoint, {"format": "nf4"}), (tiny_llama(), {})):
        with pytest.raises(ConfigError, match="resume is for format='safetensors' and a base in a folder"):
            export(source, tmp_path / "out", resume=True, **options)
