"""Who else is told of a run's events: the run store always, TensorBoard and PostHog where they are asked for.

A sink gets the lines of `metrics.jsonl`. It never fails a run: what goes wrong is said once, and the sink falls silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..finetune_config import FinetuneConfig

Notice = Callable[[str], None]


class Sink(Protocol):
    """`started` with what `run.json` holds and the lines of earlier parts of a resumed run; each line; the end."""

    def started(self, run: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...

    def ended(self, run: dict[str, Any]) -> None: ...

    def forget(self) -> None: ...


class Sinks:
    """Several sinks as one, told of a run that begins, of its lines and of its end."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def started(self, run: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
        for sink in self._sinks:
            sink.started(run, earlier)

    def line(self, line: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.line(line)

    def ended(self, run: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.ended(run)

    def forget(self) -> None:
        """The run failed before its first step and left nothing behind."""
        for sink in self._sinks:
            sink.forget()


def open_sinks(config: FinetuneConfig, notice: Notice) -> Sinks:
    """The store beside `config.out`, and what the configuration asks for.

    Raises MissingDependencyError for a service whose package is not there, ConfigError for one that lacks its key.
    """
    from .recorder import StoreSink

    sinks: list[Sink] = [StoreSink(config.out, notice)]
    if config.tensorboard is not None:
        from .tensorboard import TensorBoardSink

        sinks.append(TensorBoardSink(config.tensorboard / config.out.resolve().name, notice))
    if config.posthog is not None:
        from .posthog import PostHogSink

        sinks.append(PostHogSink(config.posthog, notice))
    return Sinks(sinks)
