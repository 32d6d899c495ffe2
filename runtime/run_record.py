"""What stays of a run: `run.json`, `metrics.jsonl`, and the sinks that are told of both; also where it ends in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import OutputError, QLoRACompileError
from ..interruption import heard
from .interrupts import InterruptedRunError
from .metrics import MetricsLog, read_metrics, write_run
from .run_folder import RunFolder
from .runs import Sinks


class RunRecord:
    """`content` is what `run.json` holds besides status and step. Until `begin` nothing is written."""

    _log: MetricsLog

    def __init__(self, folder: RunFolder, sinks: Sinks, notice: Callable[[str], None]) -> None:
        self.folder = folder
        self.sinks = sinks
        self.notice = notice
        self.content: dict[str, Any] = {}

    def begin(self, step: int, content: dict[str, Any]) -> None:
        self.content = content
        write_run(self.folder.run, self.state("running", step))

    @contextmanager
    def logging(self, step: int, without: str = "") -> Iterator[None]:
        """Within it `line` writes. A resumed run's later lines, and those of the event `without`, are dropped first."""
        with MetricsLog(self.folder.metrics, step, without) as self._log:
            self.sinks.started(self.state("running", step), read_metrics(self.folder.metrics))
            yield

    def line(self, line: dict[str, Any]) -> None:
        self._log.write(line)
        self.sinks.line(line)

    def evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation in training after this step."""
        lines = read_metrics(self.folder.metrics)
        return any(line.get("stage") == "training" and line["step"] == step for line in lines)

    def end(self, status: str, step: int, **more: Any) -> None:
        """How the run ended, once it has got as far as having something to say."""
        if self.content:
            write_run(self.folder.run, self.state(status, step) | more)
            self.sinks.ended(self.state(status, step) | more)

    def fail(self, step: int, error: BaseException) -> None:
        """Leave nothing of a run that took no step; else note `error`, which what cannot be noted never replaces."""
        try:
            if step == 0:
                self.folder.remove_unstarted()
                self.sinks.forget()
            else:
                status, text = _how_it_ended(error)
                self.end(status, step, error=text)
        except (OSError, OutputError) as failed:
            self.notice(f"how the run ended is not recorded: {failed}")

    def state(self, status: str, step: int) -> dict[str, Any]:
        """The content of `run.json`."""
        return {"status": status, "step": step, **self.content}


def _how_it_ended(error: BaseException) -> tuple[str, str]:
    """-> the status of a run, and why in words."""
    interrupted = heard() or isinstance(error, (InterruptedRunError, KeyboardInterrupt))
    status = "interrupted" if interrupted else "failed"
    text = str(error)
    if not isinstance(error, QLoRACompileError):  # its text alone may say little, or nothing
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return status, text
