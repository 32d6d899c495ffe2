"""Export from folders: numbers against peft and fp64, what is copied, dtypes, 4-bit bases, the report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_compile.errors import (
    AdapterMismatchError,
    CheckpointError,
    ConfigError,
    InvalidWeightError,
)
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import INDEX_FILE, SINGLE_FILE, open_checkpoint
from qlora_compile.runtime.formats.peft_files import PREFIX, WEIGHTS_FILE
from qlora_compile.runtime.quantized_base import SIDE_FILE, QuantizedBase
from qlora_compile.tensor import quantize_4bit

MakeModel = Callable[..., torch.nn.Module]
MakeAdapter = Callable[..., Path]
TARGETS = ("q_proj", "down_proj")
IDS = torch.arange(33).reshape(3, 11) * 5 % 97


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key) for key in checkpoint.specs}


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save_base(path: Path, model: torch.nn.Module, **options: Any) -> Path:
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {}, "use_rslora": True}])
def test_fp32_fold_equals_peft_merge_and_unload(
    tmp_path: Path, tiny_llama: MakeModel, patterns: dict[str, Any], make_adapter: MakeAdapter
) -> None:
    peft = pytest.importorskip("peft")
    base = save_base(tmp_path / "base", tiny_llama())
    adapter = make_adapter(tmp_path / "adapter", tiny_llama(), **patterns)
    merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    result = export(base, tmp_path / "out", {adapter: 1.0}, report=True)
    ours, theirs = weights_of(tmp_path / "out"), dict(merged.state_dict())
    assert result.folded == 2 * 3 and result.copied == len(ours) - 6
    for key, tensor in ours.items():
        # peft adds in fp32: each of at most 80 products and the sum may be off by one unit (2^-24 of values near 1).
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-6, atol=2e-6)
        assert key.endswith(tuple(f"{t}.weight" for t in TARGETS)) or torch.equal(tensor, theirs[key])


def test_bf16_fold_is_within_half_a_unit_of_the_exact_sum(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    adapters = {
        make_adapter(tmp_path / f"a{i}", load(tiny_checkpoint), seed=i, r=2 + i): w for i, w in ((0, 0.7), (1, -0.4))
    }
    result = export(tiny_checkpoint, tmp_path / "out", adapters, report=True)
    # Half a unit of bfloat16 is at most 2^-9 of the value (2^-8 where the exact one is just above a power of two).
    assert len(result.layers) == 6 and all(0 < layer.relative < 2**-9 for layer in result.layers)
    before, after = weights_of(tiny_checkpoint), weights_of(tmp_path / "out")
    files = {path: load_file(path / WEIGHTS_FILE) for path in adapters}
    for key in before:
        exact = before[key].double()
        for path, weight in adapters.items():
            if key.endswith(tuple(f"{t}.weight" for t in TARGETS)):
                a, b = (files[path][f"{PREFIX}{key.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
                exact = exact + weight * 5 / a.shape[0] * (b.double() @ a.double())
        _, exponent = torch.frexp(exact)
        half_unit = 2.0**-9 * torch.exp2(exponent.double())
        assert bool(((after[key].double() - exact).abs() <= half_unit * (1 + 2**-12)).all()), key


def test_untouched_tensors_and_side_files_are_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    export(tiny_checkpoint, tmp_path / "out", adapter)
    before, after = weights_of(tiny_checkpoint), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        same = before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
        assert same is not key.endswith(tuple(f"{t}.weight" for t in TARGETS))
    for file in tiny_checkpoint.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_same_bytes_whatever_the_order_of_adapters(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    model = load(tiny_checkpoint)
    one, two = make_adapter(tmp_path / "one", model, seed=1), make_adapter(tmp_path / "two", model, seed=2, r=2)
    export(tiny_checkpoint, tmp_path / "x", {one: 0.25, two: 0.5}, max_shard_size="20KB")
    export(tiny_checkpoint, tmp_path / "y", {two: 0.5, one: 0.25}, max_shard_size=20_000)
    names = sorted(file.name for file in (tmp_path / "x").iterdir())
    assert INDEX_FILE in names and names == sorted(file.name for file in (tmp_path / "y").iterdir())
    assert all((tmp_path / "x" / n).read_bytes() == (tmp_path / "y" / n).read_bytes() for n in names)


def test_shards_load_in_transformers(tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    one = export(tiny_checkpoint, tmp_path / "one", adapter)
    many = export(tiny_checkpoint, tmp_path / "many", adapter, max_shard_size="15KB")
    assert one.files.count(SINGLE_FILE) == 1 and sum(f.endswith(".safetensors") for f in many.files) > 3
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))
    again = export(tmp_path / "many", tmp_path / "again")
    assert again.folded == 0 and weights_of(tmp_path / "again").keys() == weights_of(tmp_path / "one").keys()


@pytest.mark.parametrize("dtype", ["float16", torch.float32])
def test_dtype_of_everything_that_floats(
    tiny_checkpoint: Path, tmp_path: Path, dtype: Any, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    export(tiny_checkpoint, tmp_path / "out", adapter, dtype=dtype, verify=True)
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {torch.float16 if dtype == "float16" else dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


class TestDequantized:
    def check(self, base: Path, out: Path, adapters: list[Path], weights: set[str], **quant: Any) -> None:
        """Each tensor of `out` is exactly base (4-bit and back for `weights`) + B A of the adapters, rounded once."""
        before, after = weights_of(base), weights_of(out)
        files = [load_file(adapter / WEIGHTS_FILE) for adapter in adapters]
        for key in before:
            wanted = quantize_4bit(before[key], **quant).dequantize() if key in weights else before[key]
            assert torch.equal(wanted, before[key]) is not (key in weights)
            wanted = wanted.double()
            for tensors in files:
                prefix = f"{PREFIX}{key.removesuffix('.weight')}"
                if f"{prefix}.lora_A.weight" in tensors:
                    a, b = (tensors[f"{prefix}.lora_{x}.weight"].double() for x in "AB")
                    wanted = wanted + 5 / 3 * b @ a
            assert torch.equal(after[key], wanted.to(before[key].dtype)), key

    def test_every_linear_but_the_head_by_default(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        result = export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized", verify=True, report=True)
        assert len(result.layers) == 6 and result.base_precision == "dequantized"
        self.check(tiny_checkpoint, tmp_path / "out", [adapter], self.linears(tiny_checkpoint))

    @staticmethod
    def linears(base: Path) -> set[str]:
        return {key for key in weights_of(base) if key.endswith("_proj.weight")}

    @pytest.mark.parametrize("tied", [False, True])
    def test_what_bitsandbytes_quantizes_without_a_note(
        self, tmp_path: Path, tiny_llama: MakeModel, tied: bool
    ) -> None:
        bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        # Whole blocks in each row: others bitsandbytes' code for AVX-512 without BF16 decodes with other rows' scales.
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
        base = save_base(tmp_path / "base", tiny_llama(torch.bfloat16, tie_word_embeddings=tied, **sizes))
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        trained = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, dtype=torch.bfloat16)
        trained = peft.get_peft_model(trained, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.2)
        trained.save_pretrained(tmp_path / "adapter")
        seen = load(base)  # what the adapter saw in training
        for name, module in trained.get_base_model().named_modules():
            module = getattr(module, "base_layer", module)
            if isinstance(module, bitsandbytes.nn.Linear4bit) and ".lora_" not in name:
                values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                seen.get_submodule(name.removesuffix(".base_layer")).weight.data = values.float()
        merged = peft.PeftModel.from_pretrained(seen, tmp_path / "adapter").merge_and_unload()
        export(base, tmp_path / "out", tmp_path / "adapter", "dequantized", dtype="float32")
        for key, tensor in weights_of(tmp_path / "out").items():
            torch.testing.assert_close(tensor, merged.get_parameter(key), rtol=2e-5, atol=2e-6)

    def test_side_file_says_what_was_quantized_and_how(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        weights = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
        quant: dict[str, Any] = {"quant_type": "fp4", "block_size": 32, "double_quant": False}
        (adapter / SIDE_FILE).write_text(QuantizedBase(**quant, weights=weights).to_json())
        export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized", verify=True)
        self.check(tiny_checkpoint, tmp_path / "out", [adapter], set(weights), **quant)
        (adapter / SIDE_FILE).write_text(QuantizedBase(weights=()).to_json())
        export(tiny_checkpoint, tmp_path / "dense", adapter, "dequantized")
        self.check(tiny_checkpoint, tmp_path / "dense", [adapter], set())

    def test_argument_overrides_and_differing_adapters_are_refused(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        model = load(tiny_checkpoint)
        one, two = (make_adapter(tmp_path / name, model, seed=i) for i, name in enumerate(("one", "two")))
        (one / SIDE_FILE).write_text(QuantizedBase(block_size=128).to_json())
        (two / SIDE_FILE).write_text(QuantizedBase(block_size=32).to_json())
        with pytest.raises(ConfigError, match="differently quantized bases"):
            export(tiny_checkpoint, tmp_path / "out", [one, two], "dequantized")
        export(tiny_checkpoint, tmp_path / "out", [one, two], "dequantized", quant={"block_size": 256})
        self.check(tiny_checkpoint, tmp_path / "out", [one, two], self.linears(tiny_checkpoint), block_size=256)
        with pytest.raises(ConfigError, match="did you mean 'block_size'"):
            export(tiny_checkpoint, tmp_path / "no", one, "dequantized", quant={"blocksize": 64})

    def test_broken_side_file_and_foreign_weights(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        for text in ("{", '{"block_size": 63}', '{"weights": 3}', '{"weight": []}', '{"block_size": [64]}'):
            (adapter / SIDE_FILE).write_text(text)
            with pytest.raises(CheckpointError, match="corrupt"):
                export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized")
        (adapter / SIDE_FILE).write_text(QuantizedBase(weights=("model.layers.9.q.weight",)).to_json())
        with pytest.raises(AdapterMismatchError, match=r"the base has no model.layers.9.q.weight"):
            export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized")

    def test_nan_in_the_base_is_named(self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
        base = tmp_path / "base"
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        export(tiny_checkpoint, base)
        key = "model.layers.1.self_attn.q_proj.weight"
        tensors = load_file(base / SINGLE_FILE)
        tensors[key][3, 4] = float("nan")
        save_file(tensors, base / SINGLE_FILE)
        for precision, error in (("dequantized", InvalidWeightError), ("original", CheckpointError)):
            with pytest.raises(error, match=key):
                export(base, tmp_path / "out", adapter, precision)
            assert not (tmp_path / "out").exists()


class TestReport:
    def test_worst_first_and_as_table(self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        seen: list[tuple[int, int]] = []
        result = export(
            tiny_checkpoint, tmp_path / "out", adapter, report=True, verify=True,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
        relative = [layer.relative for layer in result.layers]
        assert relative == sorted(relative, reverse=True) and relative[0] > 0
        assert seen[-1][0] == seen[-1][1] == result.total_bytes and len(seen) == result.folded + result.copied
        text = io.StringIO()
        result.print(text, limit=2)
        assert result.layers[0].name in text.getvalue() and "and 4 layers with less" in text.getvalue()
        assert "Verified against" in text.getvalue()
        assert json.loads(json.dumps(result.to_dict()))["layers"][0]["name"] == result.layers[0].name

    def test_no_report_unless_asked(self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
        result = export(tiny_checkpoint, tmp_path / "out", make_adapter(tmp_path / "a", load(tiny_checkpoint)))
        assert result.layers == [] and result.verification is None
