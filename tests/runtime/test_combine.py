"""Combined adapters: each method against the fp64 definition, peft beside it where it is right, and where it is not."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile import cli
from qlora_compile.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    ModelStateError,
    NoAdapterError,
    OutputError,
)
from qlora_compile.runtime import combine_folders as combine_module
from qlora_compile.runtime.combine_folders import combine_folders
from qlora_compile.runtime.combine_methods import METHODS
from qlora_compile.runtime.formats.peft_files import PREFIX, LoraLayer, read_adapter
from qlora_compile.runtime.quantized_base import SIDE_FILE, QuantizedBase

MakeModel = Callable[..., torch.nn.Module]
MakeAdapter = Callable[..., Path]
IDS = torch.arange(33).reshape(3, 11) * 5 % 97
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
FP32 = 2e-7  # three roundings to fp32 (A', B', and the product's norm), relative


def layers(folder: Path) -> dict[str, LoraLayer]:
    return read_adapter(folder).layers()


def delta(layer: LoraLayer) -> torch.Tensor:
    return layer.scaling * layer.b.double() @ layer.a.double()


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.fixture
def two(tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """rsLoRA of rank 4 with an alpha pattern, and plain LoRA of rank 3 on other targets too."""
    model = tiny_llama()
    one = make_adapter(tmp_path / "one", model, r=4, use_rslora=True, alpha_pattern={"layers.1.mlp.down_proj": 9})
    return one, make_adapter(tmp_path / "two", model, seed=1, targets=("q_proj", "down_proj", "v_proj"))


@pytest.mark.parametrize("method", ["cat", "sequential"])
def test_cat_is_the_exact_sum(tmp_path: Path, two: tuple[Path, Path], method: str) -> None:
    weights = {str(two[0]): 0.7, str(two[1]): -0.45}
    report = combine_folders(weights, tmp_path / "out", method)
    one, other, got = layers(two[0]), layers(two[1]), layers(tmp_path / "out")
    assert set(got) == set(one) | set(other) and len(got) == 9
    for module, layer in got.items():
        exact = sum(w * delta(part[module]) for w, part in ((0.7, one), (-0.45, other)) if module in part)
        assert relative(delta(layer), exact) < FP32
        assert layer.scaling == 1 and layer.rank == (7 if module in one else 3)
    assert max(layer.residual for layer in report.layers) < FP32
    assert one[DOWN1].scaling == 9 / math.sqrt(4)


def test_svd_is_the_best_of_its_rank_and_says_what_is_lost(tmp_path: Path, two: tuple[Path, Path]) -> None:
    report = combine_folders({str(two[0]): 0.7, str(two[1]): 1.3}, tmp_path / "out", "svd", rank=5)
    one, other, got = layers(two[0]), layers(two[1]), layers(tmp_path / "out")
    residuals = {layer.name: layer.residual for layer in report.layers}
    for module in one:
        exact = 0.7 * delta(one[module]) + 1.3 * delta(other[module])
        singular = torch.linalg.svdvals(exact)
        best = float(singular[5:].norm() / singular.norm())
        assert relative(delta(got[module]), exact) == pytest.approx(best, rel=1e-5)
        assert residuals[module] == pytest.approx(best, rel=1e-5) and best > 0.05
    assert {layer.rank for layer in got.values()} == {5, 3}  # v_proj has one part, of rank 3
    assert report.layers == sorted(report.layers, key=lambda layer: -layer.residual)


def with_peft(model: Any, folders: list[Path], **options: Any) -> dict[str, torch.Tensor]:
    """peft's add_weighted_adapter on the same files -> delta by module, in fp64."""
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(model, str(folders[0]), adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        theirs.load_adapter(str(folder), adapter_name=f"a{number}")
    theirs.add_weighted_adapter([f"a{i}" for i in range(len(folders))], adapter_name="new", **options)
    modules = dict(theirs.base_model.model.named_modules())
    found = {n: m for n, m in modules.items() if "new" in getattr(m, "lora_A", {})}
    return {
        name: m.lora_B["new"].weight.double() @ m.lora_A["new"].weight.double() * m.scaling["new"]
        for name, m in found.items()
    }


@pytest.fixture
def alike(tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter) -> list[Path]:
    """Equal ranks and targets: what peft's linear needs. Scaling 5/3."""
    return [make_adapter(tmp_path / f"alike{seed}", tiny_llama(), seed=seed) for seed in (0, 1)]


def test_linear_is_pefts_and_warns_of_its_cross_terms(tmp_path: Path, tiny_llama: MakeModel, alike: list[Path]) -> None:
    theirs = with_peft(tiny_llama(), alike, weights=[0.7, -0.3], combination_type="linear")
    report = combine_folders({str(alike[0]): 0.7, str(alike[1]): -0.3}, tmp_path / "out", "linear")
    one, other, got = layers(alike[0]), layers(alike[1]), layers(tmp_path / "out")
    for module, layer in got.items():
        assert relative(delta(layer), theirs[module]) < 1e-6  # two fp32 computations
        exact = 0.7 * delta(one[module]) - 0.3 * delta(other[module])
        assert relative(delta(layer), exact) > 0.3  # the definition's own error, not a rounding
    assert "cross terms" in report.warnings[0] and f"{report.layers[0].residual:.0%}" in report.warnings[0]


def test_cat_and_svd_agree_with_peft_where_it_is_right(
    tmp_path: Path, tiny_llama: MakeModel, alike: list[Path]
) -> None:
    weights = {str(alike[0]): 0.7, str(alike[1]): 0.3}
    one, other = layers(alike[0]), layers(alike[1])
    theirs_cat = with_peft(tiny_llama(), alike, weights=[0.7, 0.3], combination_type="cat")
    theirs_svd = with_peft(tiny_llama(), alike, weights=[0.7, 0.3], combination_type="svd", svd_rank=6)
    combine_folders(weights, tmp_path / "svd", "svd", rank=6)
    ours = layers(tmp_path / "svd")
    for module in one:
        exact = 0.7 * delta(one[module]) + 0.3 * delta(other[module])
        assert relative(theirs_cat[module], exact) < 1e-6
        assert relative(delta(ours[module]), exact) < 1e-6  # rank 6 holds both
        # peft 0.21 is right here, to the noise of an fp32 SVD.
        assert relative(theirs_svd[module], exact) < 1e-4


def test_where_peft_is_wrong_we_are_not(tmp_path: Path, tiny_llama: MakeModel, two: tuple[Path, Path]) -> None:
    theirs = with_peft(tiny_llama(), list(two), weights=[0.7, 0.3], combination_type="cat")
    combine_folders({str(two[0]): 0.7, str(two[1]): 0.3}, tmp_path / "cat")
    one, other, got = layers(two[0]), layers(two[1]), layers(tmp_path / "cat")
    exact = 0.7 * delta(one[Q0]) + 0.3 * delta(other[Q0])
    assert relative(delta(got[Q0]), exact) < FP32
    # peft 0.21 keeps use_rslora of the first adapter for the result: it scales by sqrt(7) what has its scaling inside.
    assert relative(theirs[Q0], exact) == pytest.approx(math.sqrt(7) - 1, rel=1e-3)


def test_ties_and_dare_work_on_products(tmp_path: Path, tiny_llama: MakeModel, alike: list[Path]) -> None:
    from peft.utils.merge_utils import ties

    weights = {str(alike[0]): 0.7, str(alike[1]): 0.4}
    report = combine_folders(weights, tmp_path / "ties", "ties", rank=48, density=0.3)
    one, other, got = layers(alike[0]), layers(alike[1]), layers(tmp_path / "ties")
    for module, layer in got.items():
        exact = ties([delta(one[module]), delta(other[module])], torch.tensor([0.7, 0.4]).double(), 0.3)
        assert relative(delta(layer), exact) < 1e-6  # 48 is the smaller side of every layer: nothing is cut off
    assert max(layer.residual for layer in report.layers) < 1e-6

    combine_folders(weights, tmp_path / "dare", "dare", rank=48, density=0.25, seed=3)
    for module, layer in layers(tmp_path / "dare").items():
        total = 0.7 * delta(one[module]) + 0.4 * delta(other[module])
        zero = (delta(layer).abs() < 1e-6 * total.abs().max()).double().mean()
        assert zero == pytest.approx(0.75**2, abs=0.05)  # both drop three of four; 3800 values: 4 sigma is 0.03
        # Each value is right on average: the sum over thousands of values is within a few sigmas of the exact one.
        kept = delta(layer)
        sigma = float((total.square().sum() * 3).sqrt())
        assert abs(float((kept - total).sum())) < 4 * sigma
    combine_folders(dict(reversed(weights.items())), tmp_path / "again", "dare", rank=48, density=0.25, seed=3)
    combine_folders(weights, tmp_path / "other", "dare", rank=48, density=0.25, seed=4)
    bytes_of = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("dare", "other")]
    assert bytes_of[0] != bytes_of[1]
    # Only the order of two fp64 sums may differ: each adapter drops the same values whatever the order.
    for module, layer in layers(tmp_path / "again").items():
        assert relative(delta(layer), delta(layers(tmp_path / "dare")[module])) < 1e-6


def test_weights_by_pattern(tmp_path: Path, two: tuple[Path, Path]) -> None:
    weights: dict[str, Any] = {str(two[0]): {"layers.0.*": 0.5, ".*mlp.*": -2}, str(two[1]): {".*v_proj": 0, ".*": 1}}
    combine_folders(weights, tmp_path / "out")
    one, other, got = layers(two[0]), layers(two[1]), layers(tmp_path / "out")
    assert relative(delta(got[Q0]), 0.5 * delta(one[Q0]) + delta(other[Q0])) < FP32
    assert relative(delta(got[DOWN1]), -2 * delta(one[DOWN1]) + delta(other[DOWN1])) < FP32
    assert got["model.layers.2.self_attn.q_proj"].rank == 3  # no pattern of the first matches it
    assert not any("v_proj" in module for module in got)
    with pytest.raises(ConfigError, match=r"'.*gate.*' matches no layer of the adapter"):
        combine_folders({str(two[0]): {".*gate.*": 1}}, tmp_path / "bad")


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_stock_peft_loads_the_result(
    tmp_path: Path, tiny_llama: MakeModel, two: tuple[Path, Path], method: str
) -> None:
    peft = pytest.importorskip("peft")
    combine_folders({str(two[0]): 0.7, str(two[1]): 0.4}, tmp_path / "out", method)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    model = tiny_llama().eval()
    for module, layer in layers(tmp_path / "out").items():
        model.get_submodule(module).weight.data += delta(layer).float()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)  # fp32, other order


def test_on_a_model_it_equals_the_dynamic_sum(tmp_path: Path, tiny_llama: MakeModel, two: tuple[Path, Path]) -> None:
    model = qc.prepare(tiny_llama(), {"r": 2, "compute_dtype": torch.float32}).eval()
    qc.load_adapter(model, two[0], "one")
    qc.load_adapter(model, two[1], "two")
    weights = {"one": 0.7, "two": -0.3}
    qc.set_adapters(model, weights)
    with torch.no_grad():
        dynamic = model(IDS).logits
        report = qc.combine_adapters(model, weights, "both")
        # not active yet, or the adapters would count twice: its columns are in the fp32 sum, times zero
        torch.testing.assert_close(model(IDS).logits, dynamic, rtol=1e-5, atol=1e-6)
        qc.set_adapters(model, "both")
        # fp32 throughout, sums in another order; the activations are of order 1.
        torch.testing.assert_close(model(IDS).logits, dynamic, rtol=1e-4, atol=1e-5)
        qc.set_adapters(model, {})
        assert (model(IDS).logits - dynamic).norm() > 0.05 * dynamic.norm()
    assert max(layer.residual for layer in report.layers) < FP32
    qc.save_adapter(model, tmp_path / "both", "both")
    assert layers(tmp_path / "both")[Q0].rank == 7
    qc.load_adapter(model, two[1], "two again")
    with pytest.warns(UserWarning, match="cross terms"):
        qc.combine_adapters(model, {"two": 1, "two again": 0.5}, "linear", "linear")


def test_names_and_options_are_checked(tmp_path: Path, tiny_llama: MakeModel, two: tuple[Path, Path]) -> None:
    model = qc.prepare(tiny_llama(), {"r": 2, "compute_dtype": torch.float32})
    qc.load_adapter(model, two[0], "one")
    before = sorted(model.state_dict())
    for error, words, arguments in [
        (NoAdapterError, "did you mean 'one'", ({"onee": 1.0}, "new")),
        (ModelStateError, "name 'one' of one of its parts", ({"one": 1.0}, "one")),
        (ModelStateError, "already has an adapter 'default'", ({"one": 1.0}, "default")),
        (ConfigError, "method must be one of cat", ({"one": 1.0}, "new", "kat")),
        (ConfigError, "equal ranks", ({"one": 1.0, "default": 1.0}, "new", "linear")),
        (ConfigError, "must be a finite number", ({"one": float("nan")}, "new")),
        (ConfigError, "all weights are 0", ({"one": 0}, "new")),
        (ConfigError, "name at least one", ({}, "new")),
    ]:
        with pytest.raises(error, match=words):
            qc.combine_adapters(model, *arguments)
    with pytest.raises(ConfigError, match="rank goes with svd"):
        qc.combine_adapters(model, {"one": 1.0}, "new", rank=3)
    with pytest.raises(ConfigError, match="density must be above 0"):
        qc.combine_adapters(model, {"one": 1.0}, "new", "dare", density=0)
    assert sorted(model.state_dict()) == before


def test_folders_of_other_models_outputs_and_full_tensors(
    tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter, two: tuple[Path, Path]
) -> None:
    wide = make_adapter(tmp_path / "wide", tiny_llama(hidden_size=96))
    with pytest.raises(AdapterMismatchError, match=r"different models: .*\[48, 80\] in .*one"):
        combine_folders({str(two[0]): 1, str(wide): 1}, tmp_path / "out")
    with pytest.raises(OutputError, match="holds the input"):
        combine_folders({str(two[0]): 1}, two[0], overwrite=True)
    norm = {f"{PREFIX}model.norm.weight": torch.randn(48)}
    saved = make_adapter(tmp_path / "saved", tiny_llama(), extra=norm, modules_to_save=["norm"])
    with pytest.raises(CheckpointError, match=r"norm.weight was trained in full .* fold the adapters with export"):
        combine_folders({str(saved): 0.7, str(two[1]): 0.3}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine_folders({str(saved): 1, str(two[1]): 0.3}, tmp_path / "out")
    files = read_adapter(tmp_path / "out")
    assert torch.equal(files.full_parameters()["model.norm.weight"], norm[f"{PREFIX}model.norm.weight"])
    assert files.config["modules_to_save"] == ["norm"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_too_large_are_refused(
    tmp_path: Path, tiny_llama: MakeModel, alike: list[Path], method: str
) -> None:
    for weight in (1e200, 1e308):
        with pytest.raises(ConfigError, match=r"weights are too large: the result at .* is not finite"):
            combine_folders({str(alike[0]): weight, str(alike[1]): 1}, tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_bases_of_other_names_are_told(tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter) -> None:
    names = ("org/one", "org/one", "org/two", None)
    folders = [
        str(make_adapter(tmp_path / str(i), tiny_llama(), seed=i, base_model_name_or_path=name))
        for i, name in enumerate(names)
    ]
    report = combine_folders(dict.fromkeys(folders[:2], 0.5), tmp_path / "same")
    assert report.warnings == []
    report = combine_folders(dict.fromkeys(folders, 0.5), tmp_path / "other")
    assert [text for text in report.warnings if "different bases, org/one; org/two" in text] == report.warnings


def test_the_default_rank_is_each_layers_largest(tmp_path: Path, two: tuple[Path, Path]) -> None:
    combine_folders({str(two[0]): 1, str(two[1]): 1}, tmp_path / "out", "svd")
    assert {module.rpartition(".")[2]: layer.rank for module, layer in layers(tmp_path / "out").items()} == {
        "q_proj": 4,
        "down_proj": 4,
        "v_proj": 3,
    }


def test_sigterm_leaves_nothing(
    tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(combine_module, "write_adapter", terminated)
    line = ["combine", "--adapter", str(two[0]), "--adapter", str(two[1]), "--out", str(tmp_path / "new" / "out")]
    assert cli.main(line) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted." and not (tmp_path / "new").exists()


def test_command_line(tmp_path: Path, two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[0] / SIDE_FILE).write_text(QuantizedBase().to_json())
    out = tmp_path / "out"
    line = ["combine", "--adapter", f"{two[0]}=0.7", "--adapter", str(two[1]), "--out", str(out)]
    extra = ["--method", "svd", "--rank", "2", "--module-weight", f"{two[0]}:.*down_proj=0.1"]
    assert cli.main([*line, *extra, "--json"]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert {layer["rank"] for layer in answer["layers"]} == {2} and answer["layers"][0]["residual"] > 0.01
    assert answer["adapters"][str(two[0])] == {".*down_proj": 0.1, ".*": 0.7}
    assert printed.err.startswith("warning: ") and "quantized bases" in printed.err
    assert cli.main(line) == 2 and "not empty" in capsys.readouterr().err
    assert cli.main([*line, "--overwrite"]) == 0
    assert "relative residual" in capsys.readouterr().out
    assert cli.main([*line, "--overwrite", "--module-weight", "x:y=1"]) == 2
    assert "DIR:PATTERN=WEIGHT" in capsys.readouterr().err
