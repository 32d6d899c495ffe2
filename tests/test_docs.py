"""Every Python block of README and docs runs, in order, in a folder that holds a small model.

The lowering is "eager" here, as it is the documents' code that is tested and Inductor would take minutes.
A block right after the line `<!-- not run: reason -->` is only compiled.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run: .*? -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder_of_the_reader(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `./model`, where "inductor" means "eager"."""
    from qlora_compile import config

    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    original = config.QLoRAConfig.__post_init__

    def with_a_quick_lowering(self: Any) -> None:
        original(self)
        object.__setattr__(self, "lowering", "eager" if self.lowering == "inductor" else self.lowering)

    monkeypatch.setattr(config.QLoRAConfig, "__post_init__", with_a_quick_lowering)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run_in_order(document: Path, folder_of_the_reader: Path) -> None:
    text = document.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": document.stem}
    for block in BLOCK.finditer(text):
        # Padded with blank lines, so that a traceback shows the document's own line numbers.
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(document), "exec")
        if block["skip"] is None:
            exec(code, namespace)


def test_there_are_blocks_to_run() -> None:
    """The pattern above finds what the documents hold."""
    for document in (ROOT / "README.md", ROOT / "docs" / "guide.md"):
        text = document.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == text.count("```python\n") > 0
