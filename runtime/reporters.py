"""Who is told about a training run's progress: a terminal's progress bar, plain lines, or nobody.

What cannot be written (the terminal was closed, the log's disk is full) is not said: it is no reason to end a run.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `tokens` counts loss tokens, `tokens_per_s` all tokens that went through the model.

    `paging` is what a paged optimizer moved in this step: `paged_in_bytes`, `paged_out_bytes`, `stall_ms`.
    """

    step: int
    total_steps: int
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_s: float
    seconds: float
    memory_bytes: int
    seconds_left: float | None = None
    skipped: bool = False
    loss_scale: float | None = None
    paging: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One line of `metrics.jsonl`: without what can be read elsewhere."""
        out = {"event": "step", **asdict(self), **self.paging}
        for name in ("total_steps", "seconds_left", "paging"):
            del out[name]
        return {name: value for name, value in out.items() if name != "loss_scale" or value is not None}


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation. `stage` is "dense" (before quantization), "quantized" (before training), "training", "final".

    `documents` has (index, summed loss, tokens) of each document.
    """

    step: int
    stage: str
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    documents: tuple[tuple[int, float, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"event": "eval", **asdict(self)}


class Reporter(Protocol):
    """What `finetune` tells about its progress, notices at any time, `start`, steps and evals, `close`."""

    def notice(self, message: str) -> None: ...

    def start(self, first_step: int, total_steps: int) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def evaluated(self, record: EvalRecord) -> None: ...

    def saved(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class SilentReporter:
    """Tells nobody."""

    def notice(self, message: str) -> None:
        pass

    def start(self, first_step: int, total_steps: int) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def evaluated(self, record: EvalRecord) -> None:
        pass

    def saved(self, path: Path, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class PlainReporter(SilentReporter):
    """Plain lines, for logs and pipes: each notice, and a step every `every_s` seconds, also the first and last."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.every_s = every_s
        self._first_step = 0
        self._last_line_at = -float("inf")

    def notice(self, message: str) -> None:
        with contextlib.suppress(OSError):
            print(message, file=self.stream, flush=True)

    def start(self, first_step: int, total_steps: int) -> None:
        self._first_step = first_step

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        ends = record.step in (self._first_step + 1, record.total_steps)
        if ends or record.skipped or now - self._last_line_at >= self.every_s:
            self._last_line_at = now
            self.notice(f"step {record.step}/{record.total_steps}  {describe(record)}")

    def evaluated(self, record: EvalRecord) -> None:
        self.notice(describe_eval(record))

    def saved(self, path: Path, step: int) -> None:
        self.notice(f"step {step}: checkpoint saved to {path}")


class ProgressReporter(SilentReporter):
    """A progress bar on a terminal, with notices as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def notice(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, first_step: int, total_steps: int) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        self._progress = Progress(*columns, console=self.console)
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, state="")
        with contextlib.suppress(OSError):
            self._progress.start()

    def step(self, record: StepRecord) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.update(self._task, completed=record.step, state=describe(record))

    def evaluated(self, record: EvalRecord) -> None:
        self.notice(describe_eval(record))

    def close(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.stop()
            self._progress = None


def make_reporter(stream: TextIO | None = None) -> PlainReporter | ProgressReporter:
    """A progress bar where `stream` (standard error) is a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    return ProgressReporter(Console(file=stream)) if stream.isatty() else PlainReporter(stream)


def describe(record: StepRecord) -> str:
    """`loss 2.314  312 tokens/s  1.21 GB  3:05 left`."""
    parts = ["loss -" if record.loss is None else f"loss {record.loss:.4f}"]
    parts += [f"{record.tokens_per_s:.0f} tokens/s", f"{record.memory_bytes / 1e9:.2f} GB"]
    if record.seconds_left is not None:
        minutes, seconds = divmod(round(record.seconds_left), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    if record.skipped:
        overflow = "" if record.loss_scale is None else f" in fp16, the loss scale is now {record.loss_scale:g}"
        parts.append(f"skipped: the gradients are not finite{overflow}")
    return "  ".join(parts)


def describe_eval(record: EvalRecord) -> str:
    """`perplexity of the quantized model: 27.61 (8176 tokens, 12 s)`."""
    names = {"dense": "the dense model", "quantized": "the quantized model", "final": "the fine-tuned model"}
    what = names.get(record.stage, f"step {record.step}")
    return f"perplexity of {what}: {record.perplexity:.2f} ({record.tokens} tokens, {record.seconds:.0f} s)"
