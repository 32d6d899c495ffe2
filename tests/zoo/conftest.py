"""`--models-doc FILE`: write docs/models.md from what the zoo tests found, those that failed included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HEADER = """# Models

Written by `make models-doc` from the tests in `tests/zoo` (transformers {transformers}, torch {torch}); each model is tiny
and random, its sizes no powers of two. A model **works** when all of this holds: every linear layer except those named
here is quantized and has an adapter, the backend adds no graph break, the compiled loss and gradients equal the eager
ones, the loss falls, a saved adapter loads into a fresh model and gives the same outputs, and the exported checkpoint,
loaded by plain transformers, does too.

{works} of {total} work.

| model | task | works | layers in 4 bits | dense, and why | expert weights left dense | graph breaks of its own | note |
|---|---|---|---|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models-doc", type=Path, help="write the table of models here")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--models-doc", None) is not None:
        config.pluginmanager.register(ModelsDoc(config.getoption("--models-doc")))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are too small for two threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class ModelsDoc:
    """Collects one row a test, from its recorded properties, and writes the table when the session ends.

    Rows of the file whose tests did not run stay as they are, so `-k mixtral` brings one up to date.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, tuple[bool, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or "test_architecture[" not in report.nodeid:
            return
        name = report.nodeid.partition("[")[2].rstrip("]")
        found: dict[str, Any] = dict(report.user_properties)
        works = "yes" if report.passed else f"no: {_reason(report)}"
        cells = (
            name,
            found["task"],
            works,
            *(found.get(key, "") for key in ("quantized", "dense", "experts", "breaks", "note")),
        )
        self.rows[name] = (report.passed, "| " + " | ".join(str(cell) for cell in cells) + " |")

    def pytest_sessionfinish(self) -> None:
        import transformers

        known = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        cells = {
            line.split("|")[1].strip(): line for line in known if line.startswith("| ") and "| model |" not in line
        }
        kept = {name: (line.split("|")[3].strip() == "yes", line) for name, line in cells.items()}
        rows = [row for _, row in sorted((kept | self.rows).items())]
        works = sum(passed for passed, _ in rows)
        header = HEADER.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            works=works,
            total=len(rows),
        )
        self.path.write_text(header + "\n".join(row for _, row in rows) + "\n", encoding="utf-8")


def _reason(report: pytest.TestReport) -> str:
    """The error's first line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0].replace("|", "/")[:160] if crash is not None else "see the test"
