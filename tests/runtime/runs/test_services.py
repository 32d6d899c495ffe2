"""TensorBoard and PostHog: what reaches them, and that neither can hold up a run."""

from __future__ import annotations

import dataclasses
import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_compile.errors import ConfigError, MissingDependencyError
from qlora_compile.runtime.finetune import finetune
from qlora_compile.runtime.reporters import SilentReporter
from qlora_compile.runtime.runs import open_sinks


class Server:
    """An HTTP server on 127.0.0.1 that keeps the events it is sent, answering with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.events: list[dict[str, Any]] = []
        self.raw = b""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                outer.raw += body
                outer.events += json.loads(body).get("batch", [])
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    opened = Server()
    yield opened
    opened.http.shutdown()
    opened.http.server_close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTHOG_API_KEY", "phc_test")


def test_posthog_is_told_three_kinds_of_events_and_no_text(make_config: Any, texts: Path, server: Server) -> None:
    pytest.importorskip("posthog")
    config = make_config("secretly_named", eval_data=texts, posthog=server.url, steps=3, eval_every=2)
    result = finetune(config, SilentReporter())
    assert [event["event"] for event in server.events] == [
        "run started", "run evaluated", "run evaluated", "run evaluated", "run evaluated", "run finished",
    ]  # fmt: skip
    started, *evaluated, finished = (event["properties"] for event in server.events)
    assert started["r"] == 3 and started["steps"] == 3 and started["lr"] == config.lr and started["documents"] == 2
    assert [each["stage"] for each in evaluated] == ["dense", "quantized", "training", "final"]
    assert finished["status"] == "done" and finished["perplexity"] == result.perplexity
    assert len({event["distinct_id"] for event in server.events}) == 1
    content = server.raw.decode()
    for private in ("wizards", "secretly_named", str(config.model), str(config.out.parent), socket.gethostname() + '"'):
        assert private not in content, private
    for properties in (started, *evaluated, finished):
        assert all(isinstance(value, (str, int, float, bool, type(None))) for value in properties.values())
    assert "posthog" in json.loads((config.out / "run.json").read_text())["config"]
    assert "phc_test" not in (config.out / "run.json").read_text()


def _closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


class Notices(SilentReporter):
    def __init__(self) -> None:
        self.found: list[str] = []

    def notice(self, message: str) -> None:
        self.found.append(message)


@pytest.mark.parametrize("kind", ["nobody there", "accepts and never answers", "answers 503", "no such host"])
def test_a_server_that_does_not_answer_costs_two_seconds_at_most(make_config: Any, kind: str) -> None:
    pytest.importorskip("posthog")
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    silent.listen(8)
    broken = Server(503)
    url = {
        "nobody there": _closed_port(),
        "accepts and never answers": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "answers 503": broken.url,
        "no such host": "http://no-such-host.invalid",
    }[kind]
    reporter = Notices()
    began = time.perf_counter()
    plain = finetune(make_config("plain", steps=2), SilentReporter())
    alone = time.perf_counter() - began
    began = time.perf_counter()
    found = finetune(make_config("told", steps=2, posthog=url), reporter)
    assert time.perf_counter() - began < alone + 3.5  # flush waits 2 s; the rest is this machine's noise
    assert found.losses == plain.losses
    assert len([notice for notice in reporter.found if "PostHog" in notice]) <= 1
    silent.close()
    broken.http.shutdown()
    broken.http.server_close()


def test_tensorboard_has_the_scalars_of_a_resumed_run(make_config: Any, texts: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = tmp_path / "boards"
    common: dict[str, Any] = {"eval_data": texts, "tensorboard": logs, "schedule": "constant", "warmup": 0}
    finetune(make_config(steps=4, **common), SilentReporter())
    result = finetune(make_config(steps=6, resume=True, **common), SilentReporter())
    board = reader.EventAccumulator(str(logs / "out"))
    board.Reload()
    losses = board.Scalars("train/loss")
    assert [scalar.step for scalar in losses] == list(range(1, 7))
    assert [scalar.value for scalar in losses] == pytest.approx(result.losses, rel=1e-6)  # stored as fp32
    assert board.Scalars("eval/final perplexity")[-1].value == pytest.approx(result.perplexity, rel=1e-6)
    assert "paging/bytes in" not in board.Tags()["scalars"]


def test_paging_is_logged_for_a_paged_optimizer(make_config: Any) -> None:
    config = make_config(optimizer="paged_adamw", optimizer_budget="16KiB", steps=3)
    finetune(config, SilentReporter())
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert all({"paged_in_bytes", "paged_out_bytes", "stall_ms"} <= line.keys() for line in lines)
    assert lines[1]["paged_in_bytes"] > 0 and lines[1]["paged_out_bytes"] > 0
    # by step, not from the beginning: a step moves the same pages as the one before
    assert lines[2]["paged_in_bytes"] == pytest.approx(lines[1]["paged_in_bytes"], rel=0.5)


def test_a_board_that_cannot_be_written_is_said_once(make_config: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("not a folder")
    reporter = Notices()
    assert finetune(make_config(steps=2, tensorboard=tmp_path / "file"), reporter).steps == 2
    assert len([notice for notice in reporter.found if "TensorBoard" in notice]) == 1


def test_a_disk_that_is_full_when_the_board_is_closed_is_said(tmp_path: Path) -> None:
    """In a process of its own, which may write no file of more than 300 bytes."""
    pytest.importorskip("tensorboard")
    script = f"""if True:
        import resource
        from pathlib import Path
        from qlora_compile.runtime.runs.tensorboard import TensorBoardSink
        sink = TensorBoardSink(Path({str(tmp_path)!r}), lambda text: print("notice:", text, flush=True))
        sink.started({{"step": 0}}, [])
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        for step in range(3):
            sink.line({{"event": "step", "step": step, "loss": 1.0, "lr": 1.0}})
        sink.ended({{}})
        print("ended")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    notice, ended = done.stdout.splitlines()
    assert notice.startswith("notice: TensorBoard's files in") and ended == "ended" and done.returncode == 0


@pytest.mark.parametrize(("field", "module"), [("tensorboard", "torch.utils.tensorboard"), ("posthog", "posthog")])
def test_a_missing_package_is_said_before_anything_is_loaded(
    make_config: Callable[..., Any], field: str, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    value: Any = tmp_path / "boards" if field == "tensorboard" else "http://127.0.0.1:9"
    config = dataclasses.replace(make_config(), **{field: value})
    with pytest.raises(MissingDependencyError, match=rf"pip install 'qlora-compile\[{field}\]'"):
        finetune(config, SilentReporter())
    assert not config.out.exists()


def test_wrong_addresses_and_no_key(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="posthog must be the address of a server"):
        make_config(posthog="eu.posthog.com")
    pytest.importorskip("posthog")
    monkeypatch.delenv("POSTHOG_API_KEY")
    with pytest.raises(ConfigError, match="POSTHOG_API_KEY"):
        open_sinks(make_config(posthog="https://eu.posthog.example"), print)
