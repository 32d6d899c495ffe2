"""A run -> three kinds of events for a PostHog server: started, evaluated, finished. Never a text, a path or a weight.

The client sends from a thread of its own; a server that does not answer costs two seconds at a run's end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigError, MissingDependencyError
from .sinks import Notice

KEY_VARIABLE = "POSTHOG_API_KEY"
WAIT_S = 1.0  # at the end of a run; the client itself waits as long again when the process ends
REQUEST_S = 2.0
# Numbers and names of choices only. Module names, paths and data stay here.
_CONFIG = ("steps", "epochs", "batch", "grad_accum", "seq_len", "lr", "schedule", "optimizer", "compile", "dtype")
_QLORA = ("r", "lora_alpha", "lora_dropout", "quant_type", "block_size", "double_quant", "compute_dtype", "lowering")
_RESULTS = (
    "steps",
    "skipped_steps",
    "tokens_per_s",
    "seconds",
    "perplexity_dense",
    "perplexity_quantized",
    "perplexity",
)


class PostHogSink:
    """Sends to the PostHog server `host`, with the project key of the environment variable POSTHOG_API_KEY."""

    def __init__(self, host: str, notice: Notice) -> None:
        try:
            from posthog import Posthog
        except ImportError as error:
            raise MissingDependencyError("posthog", "posthog", "Sending events to PostHog") from error
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise ConfigError(f"PostHog needs its project key in the environment variable {KEY_VARIABLE}.")
        logging.getLogger("posthog").addHandler(logging.NullHandler())  # its errors are told once, by `notice`
        self.host, self.notice = host, notice
        self._failed = False
        self._client = Posthog(key, host=host, on_error=self._on_error, max_retries=0, timeout=REQUEST_S)
        self._run_id = ""

    def started(self, run: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
        self._run_id = run["id"]
        config, data = run["config"], run["data"]
        chosen = {name: config[name] for name in _CONFIG} | {name: config["qlora"][name] for name in _QLORA}
        counts = {"documents": data["documents"], "blocks": data["blocks"], "resumed_at": run["step"]}
        versions = {f"version_{name}": version for name, version in run["versions"].items()}
        self._send("run started", chosen | counts | versions)

    def line(self, line: dict[str, Any]) -> None:
        if line["event"] == "eval":
            self._send(
                "run evaluated", {name: line[name] for name in ("stage", "step", "loss", "perplexity", "tokens")}
            )

    def ended(self, run: dict[str, Any]) -> None:
        results = run.get("results") or {}
        found = {name: results[name] for name in _RESULTS if name in results}
        self._send("run finished", {"status": run["status"], "step": run["step"]} | found)
        self._client.flush(timeout_seconds=WAIT_S)

    def forget(self) -> None:
        if self._run_id:
            self.ended({"status": "failed", "step": 0})

    def _send(self, event: str, properties: dict[str, Any]) -> None:
        anonymous = {"$process_person_profile": False, "run": self._run_id}
        self._client.capture(event, distinct_id=self._run_id, properties=anonymous | properties)

    def _on_error(self, error: Exception, batch: Any) -> None:
        """Called by the client's thread."""
        if not self._failed:
            self._failed = True
            self.notice(f"PostHog at {self.host} does not take this run's events ({type(error).__name__}): going on.")
