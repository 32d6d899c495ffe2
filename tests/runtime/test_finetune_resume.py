"""Resumed runs whose checkpoints, settings or evaluation data are not quite those of the first part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_compile.errors import CheckpointError, OutputError
from qlora_compile.runtime import checkpoint as ck
from qlora_compile.runtime.finetune import finetune
from qlora_compile.runtime.finetune_config import FinetuneConfig
from qlora_compile.runtime.metrics import read_metrics
from qlora_compile.runtime.reporters import SilentReporter
from qlora_compile.runtime.run_folder import RunFolder
from qlora_compile.runtime.run_record import RunRecord
from qlora_compile.runtime.runs.store import STORE_NAME, RunStore

MakeConfig = Callable[..., FinetuneConfig]
# A checkpoint at step 2, and one at step 3 that training goes on from.
BEGUN: dict[str, Any] = {"steps": 3, "save_every": 2}


class Notices(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def notice(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    file = tmp_path / "other.txt"
    file.write_text("seven lazy wizards jumps over a bad dog " * 12)
    return file


def list_state_only(step: Path) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest[ck.OWN_SUM]
    manifest["sha256"] = {"state.json": manifest["sha256"]["state.json"]}
    (step / "manifest.json").write_text(json.dumps(manifest))


def nest_too_deeply(step: Path) -> None:
    (step / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "message"), [(list_state_only, "holds no 'parameters'"), (nest_too_deeply, "manifest.json is corrupt")]
)
def test_a_checkpoint_that_is_not_whole_is_skipped(
    make_config: MakeConfig, damage: Callable[[Path], None], message: str
) -> None:
    finetune(make_config(**BEGUN), SilentReporter())
    checkpoints, reporter = make_config().out / "checkpoints", Notices()
    damage(checkpoints / "step-3")
    with pytest.raises(CheckpointError, match=message):  # one that is asked for by name is not replaced by another
        finetune(make_config("elsewhere", steps=4, resume=checkpoints / "step-3"), SilentReporter())
    assert finetune(make_config(steps=4, resume=True), reporter).steps == 4
    assert message in reporter.said[0] and "trying the one before" in reporter.said[0]
    assert "step-2 at step 2" in reporter.said[1] and (checkpoints / "step-3.set-aside").is_dir()


def test_a_checkpoint_file_that_cannot_be_read_is_skipped(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(make_config(**BEGUN), SilentReporter())
    reporter, sha256_of = Notices(), ck.sha256_of

    def bad_sector(path: Path) -> str:
        if path.parts[-2:] == ("step-3", "optimizer.safetensors"):
            raise OSError(5, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr(ck, "sha256_of", bad_sector)
    finetune(make_config(steps=4, resume=True), reporter)
    assert "step-3/optimizer.safetensors cannot be read: Input/output error." in reporter.said[0]
    assert "step-2 at step 2" in reporter.said[1]


@pytest.mark.parametrize(
    ("spelled", "not_the_same"), [({"seed": 0}, {"seed": 1}), ({"dtype": "float32"}, {"dtype": "bfloat16"})]
)
def test_a_setting_may_be_spelled_differently(
    make_config: MakeConfig, spelled: dict[str, Any], not_the_same: dict[str, Any]
) -> None:
    """None is the adapters' seed 0, and their compute_dtype float32."""
    for name, first, second in (("implied", {}, spelled), ("spelled", spelled, {})):
        finetune(make_config(name, steps=2, **first), SilentReporter())
        assert finetune(make_config(name, steps=3, resume=True, **second), SilentReporter()).steps == 3
    with pytest.raises(CheckpointError, match=f"was trained with {next(iter(spelled))}="):
        finetune(make_config("implied", resume=True, **not_the_same), SilentReporter())


@pytest.mark.parametrize("change", ["text", "batches"])
def test_other_evaluation_data_leaves_no_number_of_the_old(
    make_config: MakeConfig, texts: Path, other_text: Path, change: str
) -> None:
    now: dict[str, Any] = {"eval_data": other_text} if change == "text" else {"eval_data": texts, "eval_batches": 1}
    finetune(make_config(eval_data=texts, eval_every=2, **BEGUN), SilentReporter())
    reporter = Notices()
    resumed = finetune(make_config(steps=5, resume=True, **now), reporter)
    whole = finetune(make_config("whole", steps=5, **now), SilentReporter())
    assert resumed.perplexity_dense == whole.perplexity_dense != resumed.perplexity_quantized
    assert resumed.perplexity_quantized == whole.perplexity_quantized
    assert any("eval_data or eval_batches were others: its perplexities are dropped" in said for said in reporter.said)
    evals = [line for line in read_metrics(resumed.out / "metrics.jsonl") if line["event"] == "eval"]
    assert [(line["step"], line["stage"]) for line in evals] == [(3, "dense"), (3, "quantized"), (5, "final")]
    store = RunStore(resumed.out.parent / STORE_NAME)
    assert store.lines(store.find("out").id, "eval") == evals
    again = Notices()  # the checkpoints know by now what they were measured on
    finetune(make_config(steps=6, resume=True, **now), again)
    assert not any("dropped" in said for said in again.said)


def test_evaluation_may_begin_or_end_with_a_resumed_run(make_config: MakeConfig, texts: Path) -> None:
    finetune(make_config(**BEGUN), SilentReporter())
    begun = finetune(make_config(steps=4, resume=True, eval_data=texts), SilentReporter())
    assert begun.perplexity_dense == finetune(make_config("whole", eval_data=texts), SilentReporter()).perplexity_dense
    ended = finetune(make_config(steps=5, resume=True), SilentReporter())
    assert (ended.perplexity_dense, ended.perplexity_quantized, ended.perplexity) == (None, None, None)
    evals = [line for line in read_metrics(ended.out / "metrics.jsonl") if line["event"] == "eval"]
    assert evals == []


def test_as_many_batches_as_there_are_is_all_of_them(make_config: MakeConfig, texts: Path) -> None:
    finetune(make_config(eval_data=texts, eval_every=2, **BEGUN), SilentReporter())
    reporter = Notices()
    copy = Path(shutil.copytree(texts, make_config().out.parent / "copy"))
    finetune(make_config(steps=4, resume=True, eval_data=copy, eval_batches=1000), reporter)
    assert not any("dropped" in said for said in reporter.said)


@pytest.mark.parametrize("logged", [False, True])
def test_an_evaluation_that_an_interruption_kept_from_running_is_made_up_for(
    make_config: MakeConfig, other_text: Path, monkeypatch: pytest.MonkeyPatch, logged: bool
) -> None:
    options: dict[str, Any] = {"steps": 5, "save_every": 2, "eval_every": 2, "eval_data": other_text}

    def evaluations(out: Path) -> list[tuple[int, float]]:
        lines = read_metrics(out / "metrics.jsonl")
        return [(line["step"], line["loss"]) for line in lines if line.get("stage") == "training"]

    finetune(make_config("whole", **options), SilentReporter())
    write = RunRecord.line

    def stop(self: RunRecord, line: dict[str, Any]) -> None:
        last = line.get("stage") == "training"
        if logged or not last:
            write(self, line)
        if last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunRecord, "line", stop)
        finetune(make_config("cut", **options), SilentReporter())
    finetune(make_config("cut", resume=True, **options), SilentReporter())
    found = evaluations(make_config("cut").out)
    assert found == evaluations(make_config("whole").out) and [step for step, _ in found] == [2, 4]


def test_a_folder_is_one_runs_at_a_time(make_config: MakeConfig) -> None:
    """Two that found it empty would write over each other's checkpoints."""
    config, resumed = make_config(steps=1), make_config(steps=2, resume=True)
    second: list[OutputError] = []

    class Another(SilentReporter):
        def step(self, record: Any) -> None:
            for other in (config, resumed):
                with pytest.raises(OutputError) as error:
                    finetune(other, SilentReporter())
                second.append(error.value)

    finetune(config, Another())
    assert "holds a training run" in str(second[0])
    assert "Another run writes into" in str(second[1]) and second[1].exit_code == 2
    assert finetune(resumed, SilentReporter()).steps == 2  # it was let go


def test_a_run_that_has_written_nothing_yet_holds_its_folder(make_config: MakeConfig) -> None:
    folder = RunFolder(make_config().out)
    folder.open(make_config(), SilentReporter())
    with pytest.raises(OutputError, match="Another run writes into"):
        finetune(make_config(steps=1), SilentReporter())
    folder.release()
    assert finetune(make_config(steps=1), SilentReporter()).steps == 1
