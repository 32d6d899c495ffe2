"""Quantization error by layer and format, and the layers that a budget of bits keeps dense."""

from __future__ import annotations

import itertools
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

import qlora_compile as qc
from qlora_compile import cli
from qlora_compile.errors import ConfigError
from qlora_compile.numerics import compare_formats, dense_layers, layer_errors, text_perplexities, worst


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(131, 67), nn.Linear(67, 45), nn.Linear(45, 128))
    with torch.no_grad():
        model[1].weight[::7, ::5] *= 40  # outliers: one value of a block takes the whole range
    return model


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_errors_are_bitsandbytes(quant_type: str) -> None:
    model = _model()
    errors = layer_errors(model, qc.QLoRAConfig(quant_type=quant_type, double_quant=False))
    for layer, linear in zip(errors, model, strict=True):
        weight = linear.weight.detach()
        codes, state = bnb.quantize_4bit(weight, quant_type=quant_type, blocksize=64, compress_statistics=False)
        theirs = bnb.dequantize_4bit(codes, state) - weight
        # the sums are fp64 here and fp32 there
        assert layer.error == pytest.approx(float(theirs.norm() / weight.norm()), rel=1e-5)
        assert layer.weights == weight.numel()
    assert worst(errors, 2) == sorted(errors, key=lambda layer: -layer.error)[:2]


def test_formats_are_in_order() -> None:
    found = {(v.quant_type, v.block_size, v.double_quant): v for v in compare_formats([torch.randn(256, 515)])}
    for double in (True, False):
        errors = [found["nf4", size, double].error for size in (32, 64, 128, 256)]
        assert errors == sorted(errors)
        assert found["nf4", 64, double].error < found["fp4", 64, double].error  # made for normal weights
    assert found["nf4", 64, False].error <= found["nf4", 64, True].error
    assert found["nf4", 64, False].bits == pytest.approx(4.5, abs=0.01)
    assert found["nf4", 64, True].bits == pytest.approx(4.127, abs=0.01)


def test_the_budget_holds_and_the_best_layers_are_taken() -> None:
    squared, bits, weights = [9.0, 1.0, 4.0, 4.0], [400, 400, 800, 400], [100, 100, 200, 100]
    for budget in (4.0, 6.5, 9.0, 16.0):
        chosen = dense_layers(squared, bits, weights, budget)
        spent = sum(16 * weights[i] if i in chosen else bits[i] for i in range(4))
        assert spent <= budget * sum(weights)
        possible = [set(c) for n in range(5) for c in itertools.combinations(range(4), n)]
        fitting = [c for c in possible if sum(16 * weights[i] if i in c else bits[i] for i in range(4)) <= budget * 500]
        best = max(sum(squared[i] for i in c) for c in fitting)
        assert sum(squared[i] for i in chosen) == best  # greedy is no optimum in general, but is one here
    with pytest.raises(ConfigError, match=r"below what the format alone takes, 4\.000"):
        dense_layers(squared, bits, weights, 3.9)


def test_the_command(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"inspect {tiny_checkpoint} --numerics --bits 6 --seq-len 24 --r 3"
    assert cli.main(line.split()) == 0
    text = capsys.readouterr().out
    assert "worst layers in nf4/64" in text and "keep dense within the budget: model.layers." in text
    assert cli.main(["inspect", str(tiny_checkpoint), "--bits", "5"]) == 2
    assert "--bits is for --numerics." in capsys.readouterr().err


def test_perplexity_by_format_and_the_weights_come_back(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _model()
    before = [linear.weight.detach().clone() for linear in model]
    variants = compare_formats(weight for weight in before)[:4]
    dense, found = text_perplexities(
        model, qc.QLoRAConfig(), variants, lambda m: float(sum(w.detach().abs().sum() for w in m.parameters()))
    )
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(model, before, strict=True))
    for variant in found:
        kind = {"quant_type": variant.quant_type, "block_size": variant.block_size}
        values = [qc.quantize_4bit(w, **kind, double_quant=variant.double_quant).dequantize() for w in before]
        biases = sum(float(p.detach().abs().sum()) for p in model.parameters() if p.dim() == 1)
        assert variant.perplexity == pytest.approx(sum(float(w.abs().sum()) for w in values) + biases, rel=1e-6)
        assert variant.perplexity != dense
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    line = f"inspect {tiny_checkpoint} --numerics --text {tmp_path}/t.txt --seq-len 24 --r 3"
    assert cli.main(line.split()) == 0
    answer = capsys.readouterr()
    assert "perplexity of the dense model: " in answer.out and answer.err.count("perplexity") == 17
    assert cli.main(["inspect", str(tiny_checkpoint), "--text", "t.txt"]) == 2
    assert "--text is for --numerics." in capsys.readouterr().err
