"""Two runs compared: what differs, and a bootstrap that finds real differences and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_compile.runtime.runs.compare import compare, flat, in_words, paired_bootstrap
from qlora_compile.runtime.runs.store import RunStore
from qlora_compile.runtime.runs.tables import TABLES, as_text, table

Records = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def _documents(generator: np.random.Generator, count: int, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of two models whose documents differ much from each other and little between the models."""
    tokens = generator.integers(20, 400, count)
    level = generator.normal(3.0, 0.8, count)
    a = (level + generator.normal(0, 0.05, count)) * tokens
    b = (level + effect + generator.normal(0, 0.05, count)) * tokens
    return a, b, tokens


def test_the_interval_covers_and_the_p_value_is_uniform_without_an_effect() -> None:
    generator = np.random.default_rng(5)
    trials = [paired_bootstrap(*_documents(generator, 60, 0.0), resamples=999, seed=i) for i in range(400)]
    covered = np.mean([found.low <= 0 <= found.high for found in trials])
    # 95% less the known shortfall of percentile intervals at 60 documents; +-0.022 is two standard errors of 400 trials
    assert 0.90 < covered < 0.98
    small = np.mean([found.p_value < 0.05 for found in trials])
    assert 0.02 < small < 0.10
    assert 0.4 < np.mean([found.p_value for found in trials]) < 0.6


def test_an_effect_is_found_though_documents_differ_much_more() -> None:
    a, b, tokens = _documents(np.random.default_rng(1), 60, 0.03)
    found = paired_bootstrap(a, b, tokens)
    assert found.p_value < 0.01 and 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(float((b.sum() - a.sum()) / tokens.sum()))
    unpaired = paired_bootstrap(a, np.roll(b, 1), tokens)  # what pairing is worth
    assert unpaired.high - unpaired.low > 5 * (found.high - found.low)
    mirrored = paired_bootstrap(b, a, tokens)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
    # the standard error of a ratio of means (Cochran 1977, 2.39), against which 10,000 resamples are within a few percent
    residual = (b - a) - found.difference * tokens
    error = float(np.sqrt((residual**2).sum() / (len(a) - 1) / len(a)) / tokens.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert "a is better by" in in_words(found, "a", "b") and "more than chance" in in_words(found, "a", "b")


def test_many_documents_need_little_memory() -> None:
    generator = np.random.default_rng(2)
    found = paired_bootstrap(*_documents(generator, 30_000, 0.0), resamples=99)
    assert found.documents == 30_000


@pytest.fixture
def store(tmp_path: Path, records: Records) -> RunStore:
    make_run, step_line, eval_line = records
    store = RunStore(tmp_path / "s.sqlite")
    for name, r, shift in (("low", 4, 0.0), ("high", 32, -9.0)):
        run = make_run(name * 3, status="done", step=8)
        run["config"]["qlora"]["r"] = r
        run["results"] = {"perplexity": 9.5 + shift / 9, "losses": None, "steps": 8, "out": name}
        documents = [(i, 300.0 + 7 * i + shift, 100 + i) for i in range(3)]
        lines = [step_line(s, loss=3 if s == 2 else None) for s in (1, 2)]
        store.put_run(run, name, [*lines, eval_line([(0, 400.0, 100)], "dense", 0), eval_line(documents)])
    return store


def test_settings_results_and_significance(store: RunStore) -> None:
    found = compare(store, store.find("low"), store.find("high"))
    assert found.settings == {"qlora.r": (4, 32)}
    assert found.results == {"perplexity": (9.5, 8.5), "steps": (8, 8)}
    assert found.significance is not None and found.significance.documents == 3
    assert found.significance.difference == pytest.approx(-27 / 303)
    assert json.loads(json.dumps(found.to_dict()))["why_not"] is None
    assert "high is better" in in_words(found.significance, "low", "high")
    assert "so few documents" in in_words(found.significance, "low", "high")
    single = compare(store, store.find("low"), store.find("high"), "dense")
    assert single.significance is None and "two documents or more" in str(single.why_not)
    assert "no evaluation 'quantized'" in str(
        compare(store, store.find("low"), store.find("high"), "quantized").why_not
    )


def test_other_text_and_no_text_cannot_be_paired(store: RunStore, records: Records) -> None:
    make_run = records[0]
    store.put_run(make_run("other", eval_data={"sha256": "e2"}), "other", [])
    store.put_run(make_run("blind", eval_data=None), "blind", [])
    assert "different tokens" in str(compare(store, store.find("low"), store.find("other")).why_not)
    assert "blind was not evaluated" in str(compare(store, store.find("low"), store.find("blind")).why_not)


@pytest.mark.parametrize("name", ["runs", "steps", "evals", "documents"])
def test_tables_are_flat_and_typed(store: RunStore, name: str) -> None:
    rows = table(store, store.runs(), name)
    assert len(rows) == {"runs": 2, "steps": 4, "evals": 4, "documents": 8}[name]
    assert len({tuple(row) for row in rows}) == 1
    for column in rows[0]:
        assert len({type(row[column]) for row in rows if row[column] is not None}) <= 1, column
    lines = as_text(rows, "jsonl")
    assert [json.loads(line) for line in lines.splitlines()] == rows
    assert len(as_text(rows, "csv").splitlines()) == len(rows) + 1
    assert as_text([], "csv") == "\n" and as_text([], "jsonl") == ""


def test_pandas_makes_parquet_of_it(store: RunStore, tmp_path: Path) -> None:
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    for name in TABLES:
        (tmp_path / "t.jsonl").write_text(as_text(table(store, store.runs(), name), "jsonl"))
        pandas.read_json(tmp_path / "t.jsonl", lines=True).to_parquet(tmp_path / "t.parquet")
        assert parquet.read_table(tmp_path / "t.parquet").num_rows == len(table(store, store.runs(), name))


def test_flat() -> None:
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "1,2", "d": None}
