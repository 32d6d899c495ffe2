"""docs/models.md, which `make models-doc` writes, against the table that the zoo tests run."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| model")
]


def test_the_document_has_a_row_for_each_architecture_of_the_table() -> None:
    in_table = {(name, task) for task, models in TABLE.items() if task != "defaults" for name in models}
    assert {(row[0], row[1]) for row in ROWS} == in_table, "run `make models-doc`"
    assert len(ROWS) == len(in_table) >= 60


def test_every_row_says_that_it_works_or_why_not() -> None:
    for name, _, works, quantized, *_ in ROWS:
        assert works == "yes" or works.startswith("no: "), name
        assert works != "yes" or int(quantized) > 0, name
