"""A system that takes no more bytes, at the first file and in the middle of the weights: one sentence, nothing changed.

Files longer than the limit cannot be written (`ulimit -f`), by whatever code: that is what a full disk does, with another
word for it.
"""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import OutputError, RunStoreError
from qlora_compile.runtime.checkpoint import save_checkpoint
from qlora_compile.runtime.combine_folders import combine_folders
from qlora_compile.runtime.export import export
from qlora_compile.runtime.export_report import ExportReport
from qlora_compile.runtime.metrics import MetricsLog
from qlora_compile.runtime.models import materialize
from qlora_compile.runtime.runs.store import RunStore

from .gguf_models import save_family

MakeAdapter = Callable[..., Path]
Inputs = tuple[Path, Path, torch.nn.Module]


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A base folder, an adapter of it, and a prepared model."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    base = save_family(folder / "base", "Llama")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    qc.prepare(model, {"r": 3, "init_lora_weights": False})
    return base, Path(qc.save_adapter(model, folder / "adapter") or folder / "adapter"), model


def _export(**options: Any) -> Callable[[Path, Inputs], Any]:
    return lambda out, inputs: export(inputs[0], out, inputs[1], **options)


WRITERS: dict[str, Callable[[Path, Inputs], Any]] = {
    "safetensors": _export(max_shard_size="20KB"),
    "nf4": _export(format="nf4"),
    "gguf": _export(format="gguf"),
    "over another": _export(overwrite=True),
    "combine": lambda out, inputs: combine_folders({str(inputs[1]): 0.5}, out, "cat"),
    "adapter": lambda out, inputs: qc.save_adapter(inputs[2], out),
    "adapter over another": lambda out, inputs: qc.save_adapter(inputs[2], out),
    "materialize": lambda out, inputs: materialize(inputs[0], out),
    "checkpoint": lambda out, inputs: save_checkpoint(out, 3, {"adapter": {"x": torch.ones(5000)}}, {}),
    "html": lambda out, inputs: ExportReport(out, "nf4", "original", {"x" * 9000: 1.0}).to_html(out / "report.html"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [50, 9000])
def test_nothing_is_written_or_changed(tmp_path: Path, inputs: Inputs, name: str, size: int) -> None:
    out = tmp_path / "deep" / "out"
    if "over" in name:
        out.mkdir(parents=True)
        for file in ("adapter_model.safetensors", "precious"):
            (out / file).write_text("old")
    before = tree(tmp_path)
    with no_file_longer_than(size), pytest.raises(OutputError, match=r"/out.* cannot be written \(File too large\)"):
        WRITERS[name](out, inputs)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"format": "nf4"}, {"format": "gguf"}])
def test_a_resumable_export_goes_on_when_there_is_room(tmp_path: Path, inputs: Inputs, options: dict[str, Any]) -> None:
    with no_file_longer_than(25000), pytest.raises(OutputError, match=r"/out cannot be written \(File too large\)"):
        export(inputs[0], tmp_path / "out", inputs[1], resume=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    export(inputs[0], tmp_path / "out", inputs[1], resume=True, **options)
    export(inputs[0], tmp_path / "whole", inputs[1], **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_metrics_log_says_it_once(tmp_path: Path) -> None:
    with (
        no_file_longer_than(1000),
        pytest.raises(OutputError, match=r"m\.jsonl cannot be written \(File too large\)"),
        MetricsLog(tmp_path / "m.jsonl") as log,
    ):
        for step in range(100):
            log.write({"event": "step", "step": step, "loss": 1.0})


def test_a_run_store_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"id": "a", "status": "running", "step": 1, "config": {}}
    lines = [{"event": "step", "step": step, "text": "x" * 100} for step in range(500)]
    store, connect = RunStore(tmp_path / "runs.sqlite"), RunStore._connect
    with no_file_longer_than(50), pytest.raises(RunStoreError, match="cannot be written"):
        store.put_run(run, "out", lines)
    assert list(tmp_path.iterdir()) == []
    store.put_run(run, "out", lines[:3])

    def full(self: RunStore) -> sqlite3.Connection:
        database = connect(self)
        database.execute("PRAGMA max_page_count = 9")
        return database

    monkeypatch.setattr(RunStore, "_connect", full)
    with pytest.raises(RunStoreError, match=r"The disk is full: the run store .*runs\.sqlite was not written\."):
        store.add_lines("a", 3, lines)
    assert store.lines("a") == lines[:3]
