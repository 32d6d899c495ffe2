"""`Estimator`: arithmetic on one traced plan, what fits, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import qlora_compile as qc
from qlora_compile import cli
from qlora_compile.errors import ConfigError, UnknownOptionError
from qlora_compile.estimate import Estimator, devices, find_device, largest, parse_bytes, roofline_seconds

CONFIG = qc.QLoRAConfig(r=3, block_size=32)


def test_optimizers_and_phases(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama(num_hidden_layers=6)
    estimator = Estimator(model, CONFIG)
    found = estimator(2, 40)
    sites = 6 * (3 * (54 + 48) + 2 * 3 * (18 + 48) + 3 * (48 + 54) + 3 * 3 * (80 + 48))
    assert found.peaks["optimizer"].by_kind["adapters"] == 4 * sites
    assert found.peaks["optimizer"].by_kind["gradients"] == 4 * sites
    assert {peak.by_kind["optimizer"] for peak in found.peaks.values()} == {8 * sites}
    estimator.optimizer, estimator.optimizer_budget = "paged_adamw", sites
    paged = estimator(2, 40)
    assert paged.host_bytes == 7 * sites and paged.peak == found.peak - 7 * sites
    estimator.optimizer_budget = None
    assert estimator(2, 40).peak == found.peak  # a paged optimizer without a budget keeps all of it
    # formulas in batch and length: saved activations are proportional to both (the mask and attention's sums apart)
    assert estimator(4, 40).saved_bytes == pytest.approx(2 * found.saved_bytes, rel=0.02)
    assert estimator(2, 80).flops > 2 * found.flops > estimator(4, 40).flops * 0.999
    # what is the most that fits: it does, and one more does not
    memory = found.peak * 3
    most = estimator(2, 40, memory)
    assert most.fits
    assert estimator.peak_at(most.largest_batch, 40) <= memory < estimator.peak_at(most.largest_batch + 1, 40)
    assert most.longest_seq == 256 or estimator.peak_at(2, most.longest_seq + 1) > memory  # 256: the model's own limit
    assert most.table[4][512] == estimator.peak_at(4, 512)
    sheet = devices()["L4"]
    plan = estimator.plans.one.at(2, 40)
    least = max(most.flops / sheet["bf16_flops"], plan.traffic() / sheet["bytes_per_s"])
    most_seconds = most.flops / sheet["bf16_flops"] + plan.traffic() / sheet["bytes_per_s"]
    assert least * 0.999 <= roofline_seconds(plan, "L4") <= most_seconds * 1.001  # sums of thousands of terms


def test_what_to_change_so_that_it_fits(tiny_llama: Callable[..., nn.Module]) -> None:
    estimator = Estimator(tiny_llama(num_hidden_layers=6, vocab_size=40001), CONFIG)
    peak = estimator.peak_at(4, 200)
    (chunks,) = estimator(4, 200, peak - 1).ways[-1:]
    assert chunks.options == "--no-keep-logits" and chunks.peak < peak and not chunks.approximate
    changed = estimator.in_chunks
    assert changed.peak_at(4, 200) == chunks.peak
    # once, beside a chunk of them that becomes its gradient; or the chunk alone
    logits = [each.peaks_at(4, 200)["forward"].by_kind["logits"] for each in (estimator, changed)]
    assert logits[0] == 4 * 800 * 40001 + logits[1] and 0.9 * (64 << 20) < logits[1] <= 64 << 20
    *_, both = estimator(4, 200, chunks.peak - 1).ways
    assert both.options.startswith("--no-keep-logits --optimizer paged_adamw --optimizer-budget ")
    state, _ = estimator.state_bytes(estimator.plans.one)
    least = estimator(4, 200, chunks.peak - state - changed.plans.one.at(4, 200).saved_bytes() // 3)
    assert least.fits is False and least.ways and all(way.peak <= least.device_memory for way in least.ways)
    way = least.ways[-1]
    budget = float(way.options.split()[-1])
    assert "--activation-budget" in way.options and way.approximate
    # the largest of the steps: one more does not fit, and what is recomputed for a moment is counted
    again = Estimator(estimator.model, changed.config, "paged_adamw", state // 8 >> 10 << 10)
    again.plans = changed.plans  # the optimizer is no part of what is traced
    assert again.peak_at(4, 200, budget) == way.peak
    assert again.peak_at(4, 200, round(budget + 0.05, 2)) > least.device_memory
    assert again.peaks_at(4, 200, budget)["backward"].by_kind["recomputed"] > 0
    assert estimator(4, 200, 1000).ways == []


def test_units_and_names() -> None:
    assert [parse_bytes(text) for text in ("24GiB", "80GB", "1.5g", "7", "3 MiB")] == [
        24 << 30,
        80e9,
        1.5e9,
        7,
        3 << 20,
    ]
    with pytest.raises(ConfigError, match="An amount of memory is a number with a unit"):
        parse_bytes("much")
    assert find_device("rtx-4090") == "RTX-4090"
    with pytest.raises(UnknownOptionError, match="did you mean 'H100-SXM'"):
        find_device("H100-SMX")
    assert largest(lambda n: n <= 1000) == 1000
    assert largest(lambda n: n <= 1000, 77) == 77
    assert largest(lambda n: False) == 0


def test_the_command(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shutil.copy(tiny_checkpoint / "config.json", tmp_path / "config.json")
    line = f"estimate {config} --device-memory 1MiB --device l4 --batch 2 --seq-len 40 --r 3"
    assert cli.main([*line.split(), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["device"] == "L4" and answer["roofline_s"] > 0 and answer["device_memory"] == 1 << 20
    assert answer["peak"] == max(peak["bytes"] for peak in answer["peaks"].values())
    assert answer["fits"] == (answer["peak"] <= 1 << 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--device-memory lots", "An amount of memory"),
        ("--device h200", "did you mean 'H200-SXM'?"),
        ("--optimizer adam", "Unknown optimizer 'adam': did you mean 'adamw'?"),
        ("--optimizer-budget 1GiB", "An optimizer budget is for the paged optimizers"),
        ("--batch 0", "batch must be from 1 to 1048576, got 0."),
    ],
)
def test_wrong_use(tiny_checkpoint: Path, options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", str(tiny_checkpoint), *options.split()]) == 2
    assert words in capsys.readouterr().err
