"""Adapters of prepared models: stock peft computes the same, loading is all or nothing, weights need no compile."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    NoAdapterError,
    OutputError,
)
from qlora_compile.modules import adapter_sites
from qlora_compile.runtime.adapters import adapter_weights
from qlora_compile.runtime.formats.peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter, write_adapter
from qlora_compile.runtime.quantized_base import SIDE_FILE, QuantizedBase, read_side_file

MakeModel = Callable[..., torch.nn.Module]
IDS = torch.arange(26).reshape(2, 13) * 7 % 101
DENSE: dict[str, Any] = {"quantize": False, "compute_dtype": torch.float32}


def prepared(model: torch.nn.Module, **config: Any) -> torch.nn.Module:
    """Prepared, with B not zero and modules_to_save changed, so that everything that is saved matters."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "compute_dtype": torch.float32}
    model = qc.prepare(model, settings | config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key or "norm" in key}


def same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3.5}},
        {"target_modules": ("q_proj", "v_proj"), "modules_to_save": ("norm",), "r": 1},
        {"target_modules": r".*layers\.[02]\..*_proj", "rank_pattern": {"layers.0.mlp.up_proj": 0}},
        {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)},
    ],
)
def test_stock_peft_computes_the_same(tmp_path: Path, tiny_llama: MakeModel, config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = prepared(tiny_llama(), **DENSE, **config)
    qc.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    ours = logits(model)
    # fp32 both; our product is scaled after B, theirs too, but the sums run in another order.
    torch.testing.assert_close(logits(theirs), ours, rtol=1e-4, atol=1e-5)
    assert (logits(tiny_llama().eval()) - ours).norm() > 0.05 * ours.norm()
    wanted = {name for name, site in adapter_sites(model).items() if site.adapters}
    assert {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")} == wanted


def test_files_are_deterministic_and_round_trip(tmp_path: Path, tiny_llama: MakeModel) -> None:
    model = prepared(tiny_llama(), rank_pattern={"k_proj": 1})
    for name in ("one", "two"):
        qc.save_adapter(model, tmp_path / name)
    for file in (CONFIG_FILE, WEIGHTS_FILE, SIDE_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / CONFIG_FILE).read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
    assert (config["r"], config["lora_alpha"], len(config["rank_pattern"])) == (4, 6, 3)

    other = qc.prepare(tiny_llama(), qc.QLoRAConfig(r=4, lora_alpha=6, rank_pattern={"k_proj": 1}, seed=5)).eval()
    assert not same_state(state(other), state(model))
    qc.load_adapter(other, tmp_path / "one")
    assert same_state(state(other), state(model))
    qc.save_adapter(other, tmp_path / "three")
    assert (tmp_path / "three" / WEIGHTS_FILE).read_bytes() == (tmp_path / "one" / WEIGHTS_FILE).read_bytes()


def test_side_file_notes_the_quantized_weights(tmp_path: Path, tiny_llama: MakeModel) -> None:
    model = prepared(tiny_llama(torch.bfloat16), target_modules=("q_proj",), quant_type="fp4", block_size=128)
    qc.save_adapter(model, tmp_path / "adapter")
    weights = tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))
    assert read_side_file(tmp_path / "adapter") == QuantizedBase("fp4", 128, True, torch.bfloat16, weights)
    qc.save_adapter(prepared(tiny_llama(), **DENSE), tmp_path / "dense")
    assert read_side_file(tmp_path / "dense") == QuantizedBase(weights=())


def test_leaf_names_shared_with_other_modules_are_written_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make() -> torch.nn.Module:
        torch.manual_seed(2)
        block = lambda: torch.nn.ModuleDict({"up": torch.nn.Linear(5, 9), "down": torch.nn.Linear(9, 5)})
        net = torch.nn.Module()
        net.a, net.b, net.down = block(), block(), torch.nn.Linear(5, 5)
        net.forward = lambda x: net.down(x + net.b["down"](net.b["up"](net.a["down"](net.a["up"](x)))))
        return net

    model = prepared(make(), **DENSE, target_modules=("up", "a.down"), rank_pattern={"a.up": 2})
    qc.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert config["target_modules"] == ["a.down", "up"] and config["task_type"] is None
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    x = torch.randn(3, 5)
    torch.testing.assert_close(theirs.base_model.model(x), model(x), rtol=1e-5, atol=1e-6)


class TestLoad:
    def test_added_under_a_new_name(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        source = prepared(tiny_llama(), **DENSE, target_modules=("q_proj", "up_proj"), r=3, use_rslora=True)
        qc.save_adapter(source, tmp_path / "adapter")
        model = qc.prepare(tiny_llama(), qc.QLoRAConfig(r=2, **DENSE)).eval()
        before = logits(model)
        qc.load_adapter(model, tmp_path / "adapter", "second")
        site = adapter_sites(model)["model.layers.1.mlp.up_proj"]
        assert site.adapters == ["default", "second"] and site.rank("second") == 3
        assert site.scaling("second") == pytest.approx(6 / math.sqrt(3))
        assert adapter_sites(model)["model.layers.1.mlp.down_proj"].adapters == ["default"]
        qc.set_adapters(model, "second")
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-6)
        qc.set_adapters(model, {"default": 1.0})
        assert torch.equal(logits(model), before)
        qc.save_adapter(model, tmp_path / "again", "second")
        assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()

    def test_an_adapter_of_stock_peft(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            r=3, lora_alpha=7, target_modules=["k_proj", "gate_proj"], alpha_pattern={"k_proj": 2},
            init_lora_weights=False, modules_to_save=["model.norm"],
        )  # fmt: skip
        theirs = peft.get_peft_model(tiny_llama(), config).eval()
        with torch.no_grad():
            theirs.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.7)
        theirs.save_pretrained(tmp_path / "theirs")
        model = qc.prepare(tiny_llama(), qc.QLoRAConfig(r=0, modules_to_save=("model.norm",), **DENSE)).eval()
        qc.load_adapter(model, tmp_path / "theirs")
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("ahead_of_time", [False, True])
    @pytest.mark.parametrize("name", ["default", "second"])
    def test_reaches_a_model_that_is_already_compiled(
        self, tmp_path: Path, tiny_llama: MakeModel, name: str, ahead_of_time: bool
    ) -> None:
        """The graph holds the scalings, and which adapters there are: load another alpha, and another adapter."""
        options: dict[str, Any] = {"target_modules": ("q_proj",), "r": 4, "lowering": "eager", **DENSE}
        source = prepared(tiny_llama(num_hidden_layers=1), **(options | {"lora_alpha": 40}))
        qc.save_adapter(source, tmp_path / "adapter")
        model = tiny_llama(num_hidden_layers=1).eval()
        if ahead_of_time:
            model = qc.prepare(model, options)
        compiled = torch.compile(model, backend="qlora", options=None if ahead_of_time else options)
        before = logits(compiled)
        qc.load_adapter(compiled, tmp_path / "adapter", name)
        qc.set_adapters(compiled, name)
        assert not torch.allclose(logits(compiled), before, rtol=1e-3)
        # One fp32 graph against the eager model: only the order of summation differs.
        torch.testing.assert_close(logits(compiled), logits(source), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["rank", "shape", "module", "embedding", "missing", "parameter", "quantized"])
    def test_misfits_are_named_and_change_nothing(self, tmp_path: Path, tiny_llama: MakeModel, kind: str) -> None:
        model = prepared(tiny_llama(), r=3, modules_to_save=("model.norm",))
        qc.save_adapter(model, tmp_path / "good")
        files = read_adapter(tmp_path / "good")
        config, tensors = dict(files.config), {key: value + 1 for key, value in files.tensors.items()}
        last = f"{PREFIX}model.layers.2.mlp.down_proj.lora_"
        if kind == "rank":
            config["rank_pattern"] = {"layers.2.mlp.down_proj": 2}
            tensors[f"{last}A.weight"], tensors[f"{last}B.weight"] = torch.ones(2, 80), torch.ones(48, 2)
            message = r"model.layers.2.mlp.down_proj has rank 3 in the model, 2 in the adapter"
        elif kind == "shape":
            tensors[f"{last}A.weight"] = torch.ones(3, 81)
            message = r"is \[48, 80\] in the model, \[48, 81\] in the adapter"
        elif kind == "module":
            tensors[f"{PREFIX}model.layers.3.x.lora_A.weight"] = torch.ones(3, 8)
            tensors[f"{PREFIX}model.layers.3.x.lora_B.weight"] = torch.ones(9, 3)
            message = r"no adaptable layer model.layers.3.x"
        elif kind == "embedding":
            tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.ones(3, 211)
            tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.ones(48, 3)
            message = (
                r"cannot be used here: model.embed_tokens is an embedding, whose adapter can be combined and exported"
            )
        elif kind == "missing":
            del tensors[f"{last}A.weight"], tensors[f"{last}B.weight"]
            message = r"nothing for model.layers.2.mlp.down_proj"
        elif kind == "quantized":
            tensors[f"{PREFIX}model.layers.0.mlp.up_proj.weight"] = torch.ones(80, 48)
            message = r"up_proj.weight was trained in full but is 4-bit in the model"
        else:
            tensors[f"{PREFIX}model.norm.weight"] = torch.ones(47)
            message = r"model.norm.weight is \[48\] in the model, \[47\] in the adapter"
        write_adapter(tmp_path / "bad", config, tensors)
        before = state(model)
        with pytest.raises(AdapterMismatchError, match=message):
            qc.load_adapter(model, tmp_path / "bad")
        if kind != "missing" and kind != "rank":
            with pytest.raises(AdapterMismatchError, match=message):
                qc.load_adapter(model, tmp_path / "bad", "new")
        assert same_state(state(model), before)

    def test_unprepared_models_and_missing_folders(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        with pytest.raises(NoAdapterError, match="call prepare"):
            qc.load_adapter(tiny_llama(), tmp_path)
        with pytest.raises(NoAdapterError, match="call prepare"):
            qc.save_adapter(tiny_llama(), tmp_path / "out")
        with pytest.raises(CheckpointError, match="no adapter folder"):
            qc.load_adapter(prepared(tiny_llama()), tmp_path / "nowhere")
        with pytest.raises(NoAdapterError, match="no adapter 'defualt': did you mean 'default'"):
            qc.save_adapter(prepared(tiny_llama()), tmp_path / "out", "defualt")
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError):
            qc.save_adapter(prepared(tiny_llama()), tmp_path / "file")


class TestSetAdapters:
    def saved(self, tmp_path: Path, tiny_llama: MakeModel) -> Path:
        model = prepared(tiny_llama(num_hidden_layers=1), **DENSE, target_modules=("q_proj",), lowering="eager")
        return qc.save_adapter(model, tmp_path / "a")

    def two(self, tmp_path: Path, tiny_llama: MakeModel) -> torch.nn.Module:
        """Adapters "default" and "other" with the same values."""
        model = prepared(tiny_llama(num_hidden_layers=1), **DENSE, target_modules=("q_proj",), lowering="eager")
        qc.load_adapter(model, self.saved(tmp_path, tiny_llama), "other")
        return model

    def test_weights_scale_the_product(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = self.two(tmp_path, tiny_llama)
        qc.set_adapters(model, {"default": 0.25, "other": -1.5})
        assert adapter_weights(model) == {"default": 0.25, "other": -1.5}
        mixed = logits(model)
        qc.set_adapters(model, {"default": -1.25})
        torch.testing.assert_close(logits(model), mixed, rtol=1e-5, atol=1e-6)
        qc.set_adapters(model, {})
        assert torch.equal(logits(model), logits(tiny_llama(num_hidden_layers=1).eval()))
        assert adapter_weights(model) == {"default": 0.0, "other": 0.0}

    @pytest.mark.parametrize("ahead_of_time", [False, True])
    def test_no_recompilation(self, tmp_path: Path, tiny_llama: MakeModel, ahead_of_time: bool) -> None:
        options: dict[str, Any] = {"target_modules": ("q_proj",), "r": 4, "lowering": "eager", **DENSE}
        model = self.two(tmp_path, tiny_llama) if ahead_of_time else tiny_llama(num_hidden_layers=1).eval()
        compiled = torch.compile(model, backend="qlora", options=None if ahead_of_time else options)
        results = [logits(compiled)]
        if not ahead_of_time:
            qc.load_adapter(compiled, self.saved(tmp_path, tiny_llama))
        for weight in (1.0, 0.5, -2.0):
            qc.set_adapters(compiled, {"default": weight})
            with torch._dynamo.config.patch(error_on_recompile=weight != 1.0):
                results.append(logits(compiled))
            torch.testing.assert_close(results[-1], logits(model), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(results[-1], results[-2], rtol=1e-3)

    def test_mistakes(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = self.two(tmp_path, tiny_llama)
        with pytest.raises(NoAdapterError, match="no adapter 'othre': did you mean 'other'"):
            qc.set_adapters(model, {"default": 0.5, "othre": 1.0})
        for weight in (float("nan"), "1", True, None):
            with pytest.raises(ConfigError, match="must be a finite number"):
                qc.set_adapters(model, {"default": weight})  # type: ignore[dict-item]
        assert adapter_weights(model) == {"default": 1.0, "other": 1.0}


@pytest.mark.parametrize("name", ["v1.0", "", "keys", "items", 3])
def test_names_that_no_adapter_can_have_are_refused_first(tmp_path: Path, tiny_llama: Any, name: Any) -> None:
    model = qc.prepare(tiny_llama(num_hidden_layers=1), {"r": 3, "lowering": "eager"})
    folder = qc.save_adapter(model, tmp_path / "adapter")
    before = set(dict(model.named_parameters()))
    with pytest.raises(ConfigError, match="cannot have the name"):
        qc.load_adapter(model, folder, name)
    with pytest.raises(ConfigError, match="cannot have the name"):
        qc.combine_adapters(model, {"default": 0.5}, name)
    assert set(dict(model.named_parameters())) == before
    qc.load_adapter(model, folder, "v1-0")
