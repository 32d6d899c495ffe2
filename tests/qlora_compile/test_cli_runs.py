"""`qlora-compile runs` over two real runs: list, show, compare, export, and wrong use."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from qlora_compile import cli

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "wizards", "mix"]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of another rank and learning rate, evaluated on four documents."""
    folder = tmp_path_factory.mktemp("experiments")
    lines = [" ".join(WORDS[(i * 5 + shift) % len(WORDS)] for i in range(40)) for shift in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for name, options in (("weak", "--r 2 --lr 1e-5"), ("strong", "--r 5 --lr 1e-2")):
        line = f"finetune --model {tiny_checkpoint} --data {folder}/texts.jsonl --eval-data {folder}/texts.jsonl "
        line += f"--out {folder}/{name} --steps 6 --seq-len 13 --batch 2 --no-compile --compute-dtype float32 {options}"
        assert cli.main(line.split()) == 0
    return folder


def _run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["runs", *line.split()]) == code
    answer = capsys.readouterr()
    return answer.out if code == 0 else answer.err


def test_list_and_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _run(capsys, f"list --store {folder}")
    assert text.index("weak") < text.index("strong") and text.count("done") == 2
    (weak, strong) = json.loads(_run(capsys, f"list --store {folder} --json"))["runs"]
    assert (weak["run"], weak["r"], weak["steps"]) == ("weak", 2, 6) and strong["perplexity"] < weak["perplexity"]
    shown = _run(capsys, f"show {weak['id'][:6]} --store {folder}")
    assert "qlora.quant_type" in shown and "quantized" in shown
    assert _run(capsys, f"show {folder}/weak/ --store {folder}") == shown
    assert "Unknown run" in _run(capsys, f"show elsewhere/weak --store {folder}", code=2)
    lines = json.loads(_run(capsys, f"show weak --store {folder} --json"))["lines"]
    assert [line["event"] for line in lines] == ["eval", "eval", *["step"] * 6, "eval"]


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _run(capsys, f"compare weak strong --store {folder}")
    assert "qlora.r" in text and "strong is better by" in text and "over 4 documents" in text
    found = json.loads(_run(capsys, f"compare weak strong --store {folder} --json"))
    assert found["settings"] == {"qlora.r": [2, 5], "lr": [1e-5, 1e-2]}
    assert found["significance"]["difference"] < 0 and found["significance"]["p_value"] < 0.05
    same = json.loads(_run(capsys, f"compare weak strong --store {folder} --stage quantized --json"))["significance"]
    assert same["difference"] == 0 and same["p_value"] == 1


def test_export(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(_run(capsys, f"export --store {folder}"))))
    assert [(row["run"], row["config.qlora.r"]) for row in rows] == [("weak", "2"), ("strong", "5")]
    out = tmp_path / "new" / "steps.jsonl"
    assert _run(capsys, f"export strong --table steps --format jsonl --store {folder} --out {out}") == ""
    steps = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6] and {row["run"] for row in steps} == {"strong"}


@pytest.mark.parametrize("table", ["runs", "steps", "evals", "documents"])
def test_an_export_is_parquet_as_it_is(
    table: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Both formats read without a word about types, written as Parquet and read back: the same rows."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import csv as arrow_csv
    from pyarrow import json as arrow_json

    found = {}
    for format_, read in (("jsonl", arrow_json.read_json), ("csv", arrow_csv.read_csv)):
        text = tmp_path / f"table.{format_}"
        _run(capsys, f"export --table {table} --format {format_} --store {folder} --out {text}")
        parquet.write_table(read(text), tmp_path / "table.parquet")
        found[format_] = parquet.read_table(tmp_path / "table.parquet")
        if format_ == "jsonl":
            rows = [json.loads(line) for line in text.read_text().splitlines()]
            columns = found[format_].column_names
            assert rows and all(list(row) == columns for row in rows)  # every row has every column, in one order
            types = {str(kind) for kind in found[format_].schema.types}
            assert not any(kind.startswith(("struct", "list")) for kind in types)
            assert [{**row, **times(row)} for row in found[format_].to_pylist()] == [
                {**row, **times(row)} for row in rows
            ]
    assert found["csv"].column_names == found["jsonl"].column_names
    assert found["csv"].num_rows == found["jsonl"].num_rows


def times(row: dict[str, object]) -> dict[str, str]:
    """Dates as the text that they were: Arrow reads them as moments."""
    return {name: str(row[name])[:10] for name in ("started", "updated") if name in row}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("show weka", "Unknown run 'weka': did you mean 'weak'?"),
        ("compare weak strong --stage finale", "Unknown evaluation 'finale': did you mean 'final'?"),
        ("export --table step", "Unknown table 'step': did you mean 'steps'?"),
        ("export --format parquet", "Unknown format 'parquet': known: csv, jsonl."),
        ("export --out texts.jsonl/x.csv", "cannot be written"),
    ],
)
def test_wrong_use(
    folder: Path, line: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert words in _run(capsys, line, code=2)


def test_no_store_and_a_corrupt_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no run store" in _run(capsys, f"list --store {tmp_path}", code=2)
    (tmp_path / "qlora-runs.sqlite").write_text("these are not the rows that you are looking for " * 30)
    error = _run(capsys, f"list --store {tmp_path}", code=1)
    assert "is not a database" in error and error.count("\n") == 1 and "Traceback" not in error
