"""A run -> TensorBoard's event files, through torch's own writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError
from .sinks import Notice

_STEP_TAGS = {
    "loss": "train/loss",
    "lr": "train/learning rate",
    "grad_norm": "train/gradient norm",
    "tokens_per_s": "speed/tokens per second",
    "memory_bytes": "memory/bytes",
    "paged_in_bytes": "paging/bytes in",
    "paged_out_bytes": "paging/bytes out",
    "stall_ms": "paging/ms waited",
}


class TensorBoardSink:
    """Scalars of steps and evaluations in `folder`. A folder that cannot be written is left alone with a notice."""

    def __init__(self, folder: Path, notice: Notice) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError("tensorboard", "tensorboard", "Writing TensorBoard's files") from error
        self._make_writer = SummaryWriter
        self.folder = folder
        self.notice = notice
        self._writer: Any = None

    def started(self, run: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
        try:
            # A resumed run does the steps after its checkpoint again: those of before must not be shown beside them.
            self._writer = self._make_writer(str(self.folder), purge_step=run["step"] + 1 if run["step"] else None)
        except OSError as error:
            self.notice(
                f"TensorBoard's folder {self.folder} cannot be written ({error.strerror}): going on without it."
            )

    def line(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            return
        if line["event"] == "eval":
            found = {f"eval/{line['stage']} perplexity": line["perplexity"], f"eval/{line['stage']} loss": line["loss"]}
        else:
            found = {tag: line[key] for key, tag in _STEP_TAGS.items() if line.get(key) is not None}
        try:
            for tag, value in found.items():
                self._writer.add_scalar(tag, value, line["step"])
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self.notice(f"TensorBoard's files in {self.folder} cannot be written ({error}): going on without them.")

    def ended(self, run: dict[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()  # what its thread could not write is said here at the latest
        except OSError as error:
            self._give_up(error)

    def forget(self) -> None:
        self.ended({})
