"""The output folder of a training run: its names, when it may be written, and what a resumed run starts from."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from .checkpoint import SET_ASIDE, Checkpoint, list_checkpoints, load_checkpoint, load_newest, set_aside
from .finetune_config import FinetuneConfig
from .formats.atomic import check_output_folder, output_errors
from .formats.temporary import lock_folder
from .reporters import Reporter
from .training_state import check_complete

# Fields that a resumed run may change: they choose where, how long and how, not what is computed in a step.
FREE = {"model", "data", "out", "eval_data", "steps", "epochs", "save_every", "keep_last", "resume"}
FREE |= {"eval_every", "eval_batches", "compile", "device", "fsdp", "tensorboard", "posthog"}
FREE |= {"step_in_backward", "memory_budget", "optimizer_budget", "optimizer_folder"}
FREE_QLORA = {"lowering", "outline_layers", "dump_dir", "activation_budget", "keep_logits", "kernels", "autotune"}


class RunFolder:
    """`adapter/`, `metrics.jsonl`, `run.json` and `checkpoints/` in one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.run = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = None  # a descriptor of the folder, locked

    def open(self, config: FinetuneConfig, reporter: Reporter) -> Checkpoint | None:
        """Make the folder, for this run alone, and return the checkpoint to resume from (None: start at step 0).

        Raises OutputError where it is not empty (without `resume`), is not a run's, is another run's now or cannot be
        written, and CheckpointError where the checkpoint asked for is damaged or was made with other settings.
        """
        self._check_free(config)
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        self._hold()
        try:
            self._check_free(config)  # again: another run may have come and gone
            return self._start(config, reporter)
        except BaseException:
            self.release()
            raise

    def _check_free(self, config: FinetuneConfig) -> None:
        resumed = self.run.is_file()
        if config.resume is False or not resumed:
            if resumed:
                raise OutputError(f"{self.path} holds a training run: resume it, or choose another output folder.")
            check_output_folder(self.path)

    def _hold(self) -> None:
        """Lock the folder until `release`, or the end of the process, where the system has such locks."""
        try:
            self._lock = lock_folder(self.path)
        except BlockingIOError:
            raise OutputError(
                f"Another run writes into {self.path} now: wait until it ends, or choose another output folder."
            ) from None

    def release(self) -> None:
        """The end of the run; idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _start(self, config: FinetuneConfig, reporter: Reporter) -> Checkpoint | None:
        checkpoint = self._find_checkpoint(config, reporter)
        if checkpoint is not None:
            check_same_settings(config, checkpoint)
            reporter.notice(f"resuming from {checkpoint.path} at step {checkpoint.step}")
        elif config.resume is not False:
            reporter.notice(f"there is no checkpoint in {self.path} yet: starting at step 0")
        return checkpoint

    def run_id(self) -> str:
        """The id that `run.json` holds of an earlier part of this run, or a new one."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(self.run.read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("id"), str):
                return content["id"]
        return uuid.uuid4().hex[:12]

    def remove_unstarted(self) -> None:
        """Leave nothing behind of a run that failed before its first step, so that the next try finds no run here."""
        for file in (self.run, self.metrics):
            file.unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _find_checkpoint(self, config: FinetuneConfig, reporter: Reporter) -> Checkpoint | None:
        if isinstance(config.resume, bool):
            return load_newest(self.checkpoints, reporter.notice, check_run) if config.resume else None
        checkpoint = load_checkpoint(config.resume)
        check_run(checkpoint)
        for path in list_checkpoints(self.checkpoints):
            # Those of later steps belong to a line of training that is left now.
            if int(path.name.removeprefix("step-")) > checkpoint.step:
                reporter.notice(f"{path} is newer than the checkpoint to resume: renamed to {path.name}{SET_ASIDE}")
                set_aside(path)
        return checkpoint


def check_run(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where it is not a whole checkpoint of a run."""
    check_complete(checkpoint, "config", "data", "model", "position", "perplexity")


def check_same_settings(config: FinetuneConfig, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError naming the first setting that a resumed run must not change, but does."""
    stored = checkpoint.state.get("config")
    if not isinstance(stored, dict) or not isinstance(stored.get("qlora"), dict):
        raise CheckpointError(f"The checkpoint {checkpoint.path} does not say what it was trained with.")
    stored, here = _effective(stored), _effective(config.to_dict())
    pairs: list[tuple[str, Any, Any]] = [(name, stored.get(name), here[name]) for name in here if name not in FREE]
    pairs.remove(("qlora", stored["qlora"], here["qlora"]))
    pairs += [(k, stored["qlora"].get(k), v) for k, v in here["qlora"].items() if k not in FREE_QLORA]
    for name, before, now in pairs:
        if before != now:
            raise CheckpointError(
                f"{checkpoint.path} was trained with {name}={before!r}, this run has {now!r}: give the same value, or "
                f"start a new run in another folder."
            )


def _effective(config: dict[str, Any]) -> dict[str, Any]:
    """None -> the value of the adapters' settings that it stands for."""
    qlora = config["qlora"]
    stands_for = {"seed": qlora.get("seed"), "dtype": qlora.get("compute_dtype")}
    return config | {name: value for name, value in stands_for.items() if config.get(name) is None}
