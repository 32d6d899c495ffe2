"""Export of a prepared model: the same tensors as from its saved adapter, by folder or from what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qlora_compile as qc
from qlora_compile.errors import (
    ConfigError,
    ModelStateError,
    NoAdapterError,
)
from qlora_compile.modules import adapter_parameters
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.formats.peft_files import read_adapter

MakeModel = Callable[..., torch.nn.Module]
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


class TestExportOfAModel:
    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(folder)
        return {key: checkpoint.tensor(key) for key in checkpoint.specs}

    def test_into_the_original_folder_equals_export_of_the_saved_adapter(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        model = prepared(AutoModelForCausalLM.from_pretrained(tiny_checkpoint), modules_to_save=("model.norm",))
        qc.save_adapter(model, tmp_path / "adapter")
        for precision in ("original", "dequantized"):
            qc.export(tiny_checkpoint, tmp_path / precision, tmp_path / "adapter", precision, verify=True)
            qc.export(model, tmp_path / f"model_{precision}", None, precision, base=tiny_checkpoint, verify=True)
            one, two = self.weights(tmp_path / precision), self.weights(tmp_path / f"model_{precision}")
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert not torch.equal(one["model.norm.weight"], self.weights(tiny_checkpoint)["model.norm.weight"])

        result = qc.export(model, tmp_path / "alone", None, "dequantized", verify=True, report=True)
        alone = self.weights(tmp_path / "alone")
        assert alone.keys() == two.keys() and all(torch.equal(alone[key], two[key]) for key in alone)
        assert result.folded == len(result.layers) == 21

    def test_active_weights_and_names(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = prepared(tiny_llama(), **DENSE)
        qc.save_adapter(model, tmp_path / "a")
        qc.load_adapter(model, tmp_path / "a", "other")
        qc.set_adapters(model, {"default": 0.5, "other": 0.25})
        assert qc.export(model, tmp_path / "one", verify=True).adapters == {"default": 0.5, "other": 0.25}
        qc.export(model, tmp_path / "two", {"default": 0.75})
        qc.export(model, tmp_path / "three", {str(tmp_path / "a"): 0.75})
        one, two, three = (self.weights(tmp_path / name) for name in ("one", "two", "three"))
        for key in one:
            # 0.5 x + 0.25 x and 0.75 x are the same number, summed in another order in fp64 and rounded once.
            torch.testing.assert_close(one[key], two[key], rtol=1e-7, atol=0)
            assert torch.equal(two[key], three[key])
        with pytest.raises(NoAdapterError, match="neither an adapter of the model"):
            qc.export(model, tmp_path / "four", {"nobody": 1.0})

    @pytest.mark.parametrize(
        "weights", [{"default": 0.5}, {"default": 2.0, "other": 2.0}, {"default": -0.3, "other": 0.7}]
    )
    def test_what_was_trained_in_full_counts_once(
        self, tiny_checkpoint: Path, tmp_path: Path, weights: dict[str, float]
    ) -> None:
        from transformers import AutoModelForCausalLM

        def load(path: Path) -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

        model = prepared(load(tiny_checkpoint), **DENSE, modules_to_save=("norm",))
        qc.save_adapter(model, tmp_path / "a")
        qc.load_adapter(model, tmp_path / "a", "other")
        qc.set_adapters(model, weights)
        qc.export(model, tmp_path / "out", base=tiny_checkpoint, dtype="float32", verify=True)
        ids = torch.arange(26).reshape(2, 13) * 7 % 101
        # fp32, sums in another order.
        got, want = load(tmp_path / "out")(input_ids=ids).logits, model(input_ids=ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_original_weights_of_a_quantized_model_need_a_folder(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        with pytest.raises(ConfigError, match="does not hold its original weights"):
            qc.export(prepared(tiny_llama()), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(ModelStateError):
            qc.set_adapters(tiny_llama(), "default")

    def test_a_parameter_used_by_other_code(self, tmp_path: Path) -> None:
        """`F.linear(x, self.w)`: no linear module owns the weight; its adapter stands under the parameter's name."""

        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(4)
                self.w = torch.nn.Parameter(torch.randn(9, 6))
                self.out = torch.nn.Linear(9, 5)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.out(torch.nn.functional.linear(x, self.w))

        x = torch.randn(4, 6)
        config = qc.QLoRAConfig(r=2, compute_dtype=torch.float32)
        model = qc.prepare(Net(), config, example_inputs=(x,))
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.add_(0.3)
        qc.save_adapter(model, tmp_path / "adapter")
        assert list(read_adapter(tmp_path / "adapter").layers()) == ["out", "w"]
        assert qc.export(model, tmp_path / "out", None, "dequantized").folded == 2
        plain = Net()
        plain.load_state_dict(self.weights(tmp_path / "out"))
        # Two layers of at most 9 terms in fp32, the sum taken in another order.
        torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
        other = qc.prepare(Net(), config, example_inputs=(x,))
        assert not torch.allclose(other(x), model(x), rtol=1e-2)
        qc.load_adapter(other, tmp_path / "adapter")
        assert torch.equal(other(x), model(x))
