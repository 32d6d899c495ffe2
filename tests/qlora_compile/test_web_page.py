"""The report as one HTML file, in a real headless Chromium driven over the WebDriver protocol."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile.errors import CheckpointError, OutputError
from qlora_compile.numerics import measure, text_perplexities
from qlora_compile.page_plan import PlannedOptimizer
from qlora_compile.report import CompileReport
from qlora_compile.runtime.export_report import ExportReport
from qlora_compile.runtime.fold import LayerError
from qlora_compile.web.page import memory_data

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1920,1080"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


class Browser:
    """The few WebDriver commands that these tests need."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        flags = [*FLAGS.split(), f"--user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"binary": BROWSER, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.base += f"/session/{session['sessionId']}"

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self("POST", "/url", {"url": "about:blank"})
        self("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def press(self, key: str) -> None:
        steps = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def errors(self) -> list[str]:
        return [
            entry["message"] for entry in self("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not BROWSER or not DRIVER:
        pytest.skip("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        opened = Browser(port, tmp_path_factory.mktemp("profile"))
        yield opened
        opened("DELETE", "")
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def report() -> CompileReport:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=32, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=211, use_cache=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).train()
    tokens = torch.zeros(2, 24, dtype=torch.long)
    inputs, config = {"input_ids": tokens, "labels": tokens}, {"r": 3, "block_size": 32}
    report = qc.trace(model, inputs, config)
    small = nn.Sequential(nn.Linear(37, 29), nn.Linear(29, 21))
    planned = PlannedOptimizer(budget=64 << 10, step_in_backward=True)
    report.paging = qc.trace(small, (torch.randn(5, 37),), config, optimizer=planned).paging
    return report


@pytest.fixture(scope="module")
def page(report: CompileReport, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    for name in ("first", "second"):
        (folder / name).mkdir()
        lines = [
            {"event": "step", "step": i, "loss": 3 / i, "tokens_per_s": 50, "memory_bytes": 10**9} for i in (1, 2, 3)
        ]
        lines.append({"event": "eval", "step": 3, "stage": "final", "perplexity": 20.5})
        if name == "second":
            lines[0] |= {"paged_in_bytes": 4096, "paged_out_bytes": 0, "stall_ms": 0.5}
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    exported = ExportReport(
        folder / "merged", "nf4", "original", {"law": 0.7}, layers=[LayerError("q", 2, 1, 0.125, 1)]
    )
    (folder / "export.json").write_text(json.dumps(exported.to_dict()))
    runs, exports = (
        [folder / "first", folder / "second"],
        [folder / "export.json", ExportReport(folder, "gguf", "", {})],
    )
    return report.to_html(folder / "report.html", runs, exports).as_uri()


def test_every_page_opens_without_an_error(browser: Browser, page: str, report: CompileReport) -> None:
    for name in ("overview", "graph", "kernels", "memory", "numerics", "export", "training"):
        browser.open(f"{page}#{name}")
        assert browser.run(f"document.getElementById('page-{name}').offsetHeight") > 20
        assert browser.errors() == [], name
    assert browser.run("performance.getEntriesByType('resource').length") == 0  # one file, nothing fetched
    titles = browser.run("[...document.querySelectorAll('#page-training h2')].map((h) => h.textContent)")
    assert titles == ["Loss", "Perplexity on held-out text", "Tokens/s", "Memory", "Paged in, bytes a step",
                      "Paged out, bytes a step", "Waited for pages, ms a step"]  # fmt: skip
    assert browser.run("document.querySelectorAll('#page-training canvas').length") == len(titles)
    inside = "[...document.querySelectorAll('#training-body > div')].every((d) => d.scrollWidth <= d.clientWidth)"
    assert browser.run(inside)  # a chart that is wider than its column runs into the next one
    exports = browser.run("document.getElementById('page-export').textContent")
    assert "merged" in exports and "law × 0.7." in exports and "1.25e-01" in exports and "were not measured" in exports
    kernels = browser.run("document.getElementById('page-kernels').textContent")
    assert "*.mlp.down_proj ×32" in kernels and "lora_linear_backward" in kernels
    text = browser.run("document.getElementById('page-overview').textContent")
    assert all(p.name in text for p in report.passes) and "layers.0…31 ×32" in text


def test_search_finds_and_a_click_shows_the_kernel(browser: Browser, page: str, report: CompileReport) -> None:
    browser.open(f"{page}#graph")
    assert browser.run("cy.nodes().length") < 40  # 32 layers as one
    search = "(q => { const s = document.getElementById('search'); s.value = q; s.dispatchEvent(new Event('input')); })"
    browser.run(f"{search}('layers.17.mlp.down_proj')")
    assert browser.run("cy.$('.match').map(n => n.id())") == ["model.layers.0…31 ×32.mlp.down_proj"]
    browser.run("(cy.$('.match')[0].emit('tap'), 1)")
    details = browser.run("document.getElementById('details').textContent")
    assert "qlora.lora_linear" in details and "modeling_llama" not in details.split("qlora.lora_linear")[0]
    # what each pass made of it: the base product and two of the adapter, then one op
    inserted, fused = details.split("insert_adapters")[1].split("fuse_lora_linear")[:2]
    assert "+ linear ×64" in inserted and "− linear ×96" in fused
    assert "+ qlora.lora_linear ×32" in fused
    assert re.search(r"kernel: ", details)
    if "dequantize_4bit" in report.kernels:
        assert browser.run("document.querySelector('#details details.kernel .source').textContent").count("qlora") > 0
    browser.run(f"{search}('no such thing')")
    assert browser.run("document.getElementById('found').textContent") == "0 found"


def test_the_memory_chart_has_the_plans_peak(browser: Browser, page: str, report: CompileReport) -> None:
    browser.open(f"{page}#memory")
    top = browser.run("Math.max(...memoryChart.data[1])")
    assert top == report.plan.peak().bytes  # type: ignore[union-attr]
    data = memory_data(report.plan)  # type: ignore[arg-type]
    assert max(map(sum, zip(*data["kinds"].values()))) == top
    made_of = browser.run("document.getElementById('made-of').textContent")
    assert "saved" in made_of and "weights" in made_of
    browser.run("document.getElementById('memory-chart').focus()")
    browser.press("\ue014")  # right arrow: the node after the peak
    phase = report.plan.events[report.plan.peak().event + 1].phase  # type: ignore[union-attr]
    assert f"{phase}: " in browser.run("document.getElementById('memory-hover').textContent")
    # pages: a chart of what is resident, one of the prefetches, and a row for each of these
    assert browser.run("document.querySelectorAll('#paging canvas').length") == 2
    rows = browser.run("[...document.querySelectorAll('.prefetches tbody tr')].map((r) => r.textContent)")
    moves = report.paging[0].prefetches
    assert len(rows) == len(moves) == 2
    for row, move in zip(rows, moves):
        assert move.parameters[0] in row and row.endswith(f"{100 * move.hidden_ms / move.copy_ms:.0f}%")
    browser.run("(hover(data.memory.event.length / 2 | 0), 1)")
    assert "B " in browser.run("document.getElementById('memory-hover').textContent")


def test_numerics_as_histogram_formats_and_worst_layers(
    browser: Browser, tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_llama()
    config = qc.QLoRAConfig(r=3)
    report = qc.trace(model, {"input_ids": torch.zeros(1, 9, dtype=torch.long)}, config)
    report.numerics, formats = measure(model, config, 6.0)
    report.perplexity_dense, report.formats = text_perplexities(model, config, formats[:3], lambda m: 7.25)
    browser.open(report.to_html(tmp_path / "n.html").as_uri() + "#numerics")
    assert browser.errors() == []
    text = browser.run("document.getElementById('page-numerics').textContent")
    assert "7.250" in text and "suggested" in text and "the other 6" in text  # of 21 layers
    assert browser.run("document.querySelectorAll('#page-numerics canvas').length") == 1


def test_keyboard_and_both_themes(browser: Browser, page: str) -> None:
    browser.open(page)
    browser.run("document.getElementById('tab-overview').focus()")
    browser.press("\ue014")  # right arrow
    assert browser.run("document.activeElement.id") == "tab-graph"
    assert browser.run("document.getElementById('page-graph').hidden") is False
    first = browser.run("document.documentElement.dataset.theme")
    colors = []
    for _ in range(2):
        colors.append(browser.run("getComputedStyle(document.body).backgroundColor"))
        browser.run("document.getElementById('theme').click()")
    assert browser.run("document.documentElement.dataset.theme") == first
    assert colors[0] != colors[1]
    for width in (1280, 1920):
        browser("POST", "/window/rect", {"width": width, "height": 900})
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_without_a_plan_and_what_cannot_be_written(tmp_path: Path, tiny_llama: Callable[..., nn.Module]) -> None:
    explained = qc.explain(qc.prepare(tiny_llama(), {"r": 3}))
    text = explained.to_html(tmp_path / "sub" / "r.html").read_text()
    assert "Only a traced report knows this" in text and "http://" not in text.split("<script>")[0]
    with pytest.raises(OutputError, match="cannot be written"):
        explained.to_html(tmp_path / "sub" / "r.html" / "x.html")
    with pytest.raises(CheckpointError, match="cannot be read"):
        explained.to_html(tmp_path / "r.html", runs=[tmp_path / "no-run"])
    (tmp_path / "other.json").write_text('{"layers": []}')
    with pytest.raises(CheckpointError, match=r"other.json is not an export's report"):
        explained.to_html(tmp_path / "r.html", exports=[tmp_path / "other.json"])
    assert not (tmp_path / "r.html").exists()
