"""Export from folders: numbers against peft and fp64, what is copied, tied tensors, dtypes, and bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
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
    OutputError,
)
from qlora_compile.runtime.export import export
from qlora_compile.runtime.fold import fold
from qlora_compile.runtime.formats import checkpoint_dir
from qlora_compile.runtime.formats.checkpoint_dir import INDEX_FILE, SINGLE_FILE, open_checkpoint
from qlora_compile.runtime.formats.peft_files import PREFIX, WEIGHTS_FILE, write_adapter
from qlora_compile.runtime.quantized_base import SIDE_FILE, QuantizedBase
from qlora_compile.tensor import quantize_4bit

MakeModel = Callable[..., torch.nn.Module]
TARGETS = ("q_proj", "down_proj")
IDS = torch.arange(33).reshape(3, 11) * 5 % 97


def make_adapter(
    path: Path, model: torch.nn.Module, *, seed: int = 0, r: int = 3, extra: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A LoRA on TARGETS (and lm_head or an embedding by `targets`) whose B is not zero, written by our writer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = dict(extra or {})
    targets = config.pop("targets", TARGETS)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] not in targets or not isinstance(weight, torch.Tensor):
            continue
        shape = tuple(weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape)
        if isinstance(module, torch.nn.Embedding):
            shape = shape[::-1]
            keys = ("lora_embedding_A", "lora_embedding_B")
        else:
            keys = ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{name}.{keys[0]}"] = torch.randn(r, shape[1], generator=generator) * 0.3
        tensors[f"{PREFIX}{name}.{keys[1]}"] = torch.randn(shape[0], r, generator=generator) * 0.3
    base = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "target_modules": list(targets)}
    return write_adapter(path, base | config, tensors)


def save_base(path: Path, model: torch.nn.Module, **options: Any) -> Path:
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key) for key in checkpoint.specs}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {}, "use_rslora": True}])
def test_fp32_fold_equals_peft_merge_and_unload(
    tmp_path: Path, tiny_llama: MakeModel, patterns: dict[str, Any]
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


def test_bf16_fold_is_within_half_a_unit_of_the_exact_sum(tiny_checkpoint: Path, tmp_path: Path) -> None:
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


def test_untouched_tensors_and_side_files_are_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
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


def test_same_bytes_whatever_the_order_of_adapters(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint)
    one, two = make_adapter(tmp_path / "one", model, seed=1), make_adapter(tmp_path / "two", model, seed=2, r=2)
    export(tiny_checkpoint, tmp_path / "x", {one: 0.25, two: 0.5}, max_shard_size="20KB")
    export(tiny_checkpoint, tmp_path / "y", {two: 0.5, one: 0.25}, max_shard_size=20_000)
    names = sorted(file.name for file in (tmp_path / "x").iterdir())
    assert INDEX_FILE in names and names == sorted(file.name for file in (tmp_path / "y").iterdir())
    assert all((tmp_path / "x" / n).read_bytes() == (tmp_path / "y" / n).read_bytes() for n in names)


def test_shards_load_in_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    one = export(tiny_checkpoint, tmp_path / "one", adapter)
    many = export(tiny_checkpoint, tmp_path / "many", adapter, max_shard_size="15KB")
    assert one.files.count(SINGLE_FILE) == 1 and sum(f.endswith(".safetensors") for f in many.files) > 3
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))
    again = export(tmp_path / "many", tmp_path / "again")
    assert again.folded == 0 and weights_of(tmp_path / "again").keys() == weights_of(tmp_path / "one").keys()


@pytest.mark.parametrize("dtype", ["float16", torch.float32])
def test_dtype_of_everything_that_floats(tiny_checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
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

    def test_targets_of_the_adapter_by_default(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        result = export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized", verify=True, report=True)
        keys = {layer.name for layer in result.layers}
        assert len(keys) == 6 and result.base_precision == "dequantized"
        self.check(tiny_checkpoint, tmp_path / "out", [adapter], keys)

    def test_side_file_says_what_was_quantized_and_how(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        weights = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
        quant: dict[str, Any] = {"quant_type": "fp4", "block_size": 32, "double_quant": False}
        (adapter / SIDE_FILE).write_text(QuantizedBase(**quant, weights=weights).to_json())
        export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized", verify=True)
        self.check(tiny_checkpoint, tmp_path / "out", [adapter], set(weights), **quant)
        (adapter / SIDE_FILE).write_text(QuantizedBase(weights=()).to_json())
        export(tiny_checkpoint, tmp_path / "dense", adapter, "dequantized")
        self.check(tiny_checkpoint, tmp_path / "dense", [adapter], set())

    def test_argument_overrides_and_differing_adapters_are_refused(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        model = load(tiny_checkpoint)
        one, two = (make_adapter(tmp_path / name, model, seed=i) for i, name in enumerate(("one", "two")))
        (one / SIDE_FILE).write_text(QuantizedBase(block_size=128).to_json())
        (two / SIDE_FILE).write_text(QuantizedBase(block_size=32).to_json())
        with pytest.raises(ConfigError, match="differently quantized bases"):
            export(tiny_checkpoint, tmp_path / "out", [one, two], "dequantized")
        export(tiny_checkpoint, tmp_path / "out", [one, two], "dequantized", quant={"block_size": 256})
        targets = {k for k in weights_of(tiny_checkpoint) if k.endswith(tuple(f"{t}.weight" for t in TARGETS))}
        self.check(tiny_checkpoint, tmp_path / "out", [one, two], targets, block_size=256)
        with pytest.raises(ConfigError, match="did you mean 'block_size'"):
            export(tiny_checkpoint, tmp_path / "no", one, "dequantized", quant={"blocksize": 64})

    def test_broken_side_file_and_foreign_weights(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        for text in ("{", '{"block_size": 63}', '{"weights": 3}', '{"weight": []}', '{"block_size": [64]}'):
            (adapter / SIDE_FILE).write_text(text)
            with pytest.raises(CheckpointError, match="corrupt"):
                export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized")
        (adapter / SIDE_FILE).write_text(QuantizedBase(weights=("model.layers.9.q.weight",)).to_json())
        with pytest.raises(AdapterMismatchError, match=r"the base has no model.layers.9.q.weight"):
            export(tiny_checkpoint, tmp_path / "out", adapter, "dequantized")

    def test_nan_in_the_base_is_named(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("precision", ["original", "dequantized"])
def test_conv1d_of_gpt2(tmp_path: Path, precision: str) -> None:
    """[in, out] weights, one of them square; the checkpoint's keys lack the model's prefix, as on the hub."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=36, n_layer=2, n_head=3, vocab_size=97, n_positions=32, n_inner=60)
    model = transformers.GPT2LMHeadModel(config)
    save_base(tmp_path / "base", model)
    tensors = load_file(tmp_path / "base" / SINGLE_FILE)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "base" / SINGLE_FILE, metadata={"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", model, targets=("c_attn", "c_proj"), fan_in_fan_out=True)
    result = export(tmp_path / "base", tmp_path / "out", adapter, precision, verify=True, report=True)
    assert result.verification is not None and result.verification.reference.endswith("stock peft")
    assert {layer.name for layer in result.layers} == {
        f"h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    }
    # fp32: what is left is the order of summation.
    assert result.verification.effect is not None and result.verification.effect > 0.01
    assert result.verification.relative < 1e-5


class TestTied:
    """Head and embedding are one tensor in the base; PEFT computes with two as soon as one of them is trained."""

    def run(
        self, tmp_path: Path, model: torch.nn.Module, **adapter: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        base = save_base(tmp_path / "base", model)
        assert "lm_head.weight" not in weights_of(base)
        result = export(base, tmp_path / "out", make_adapter(tmp_path / "adapter", model, **adapter), verify=True)
        assert result.verification is not None and result.verification.relative < 1e-5
        assert result.verification.effect is not None and result.verification.effect > 1e-3
        return weights_of(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())

    def test_stays_tied_where_neither_is_trained(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        weights, config = self.run(tmp_path, tiny_llama())
        assert "lm_head.weight" not in weights and config["tie_word_embeddings"] is True

    def test_head_with_an_adapter_is_untied(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = tiny_llama()
        weights, config = self.run(tmp_path, model, targets=("q_proj", "lm_head"))
        assert torch.equal(weights["model.embed_tokens.weight"], model.state_dict()["model.embed_tokens.weight"])
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert config["tie_word_embeddings"] is False

    def test_embedding_with_an_adapter_leaves_the_head(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = tiny_llama()
        weights, config = self.run(tmp_path, model, targets=("embed_tokens",))
        assert torch.equal(weights["lm_head.weight"], model.state_dict()["lm_head.weight"])
        assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert config["tie_word_embeddings"] is False

    def test_both_trained_in_full_and_equal_stay_tied(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        model = tiny_llama()
        new = torch.randn(model.state_dict()["lm_head.weight"].shape)
        both = {f"{PREFIX}{name}.weight": new.clone() for name in ("lm_head", "model.embed_tokens")}
        weights, config = self.run(tmp_path, model, extra=both, modules_to_save=["lm_head", "model.embed_tokens"])
        assert "lm_head.weight" not in weights and torch.equal(weights["model.embed_tokens.weight"], new)
        assert config["tie_word_embeddings"] is True


def test_modules_trained_in_full_replace_or_mix(tmp_path: Path, tiny_llama: MakeModel) -> None:
    model = tiny_llama()
    base = save_base(tmp_path / "base", model)
    new = {f"{PREFIX}model.norm.weight": torch.rand(48) + 0.5}
    adapter = make_adapter(tmp_path / "adapter", model, extra=new, modules_to_save=["model.norm"])
    export(base, tmp_path / "whole", adapter, verify=True)
    old, got = model.state_dict()["model.norm.weight"], weights_of(tmp_path / "whole")["model.norm.weight"]
    assert torch.equal(got, new[f"{PREFIX}model.norm.weight"])
    export(base, tmp_path / "half", {adapter: 0.25}, verify=True)
    got = weights_of(tmp_path / "half")["model.norm.weight"]
    # One rounding from fp64.
    assert torch.equal(got, (0.75 * old.double() + 0.25 * new[f"{PREFIX}model.norm.weight"].double()).float())


class TestReport:
    def test_worst_first_and_as_table(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
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

    def test_no_report_unless_asked(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        result = export(tiny_checkpoint, tmp_path / "out", make_adapter(tmp_path / "a", load(tiny_checkpoint)))
        assert result.layers == [] and result.verification is None


class TestVerify:
    def test_wrong_numbers_are_refused_and_not_written(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))

        def doubled(weight: torch.Tensor, terms: Any, **options: Any) -> torch.Tensor:
            return fold(weight, [*terms, *terms], **options)

        monkeypatch.setattr("qlora_compile.runtime.export_write.fold", doubled)
        with pytest.raises(CheckpointError, match="does not compute what base"):
            export(tiny_checkpoint, tmp_path / "out", adapter, verify=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]

    def test_several_weighted_adapters(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        model = load(tiny_checkpoint)
        adapters = {
            make_adapter(tmp_path / n, model, seed=s, r=2 + s): w for n, s, w in (("a", 1, 0.6), ("b", 2, -0.5))
        }
        result = export(tiny_checkpoint, tmp_path / "out", adapters, verify=True, dtype="float32")
        assert result.verification is not None and result.verification.reference.endswith("fp32 hooks")
        assert result.verification.relative < 1e-5 < 0.01 < (result.verification.effect or 0)


class TestBadInput:
    def test_adapter_of_another_architecture(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        files = {
            f"{PREFIX}h.{i}.attn.lora_{x}.weight": torch.ones(s)
            for i in range(5)
            for x, s in (("A", (2, 7)), ("B", (9, 2)))
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["attn"]}
        adapter = write_adapter(tmp_path / "adapter", config, files)
        with pytest.raises(AdapterMismatchError, match=r"the base has no h.0.attn.weight; .* \(and 2 more\)"):
            export(tiny_checkpoint, tmp_path / "out", adapter)
        assert not (tmp_path / "out").exists()

    def test_adapter_of_another_shape(self, tiny_checkpoint: Path, tmp_path: Path, tiny_llama: MakeModel) -> None:
        adapter = make_adapter(tmp_path / "adapter", tiny_llama(hidden_size=66))
        with pytest.raises(AdapterMismatchError, match=r"down_proj.weight is \[48, 80\] in the base, \[66, 80\]"):
            export(tiny_checkpoint, tmp_path / "out", adapter)
        grown = {f"{PREFIX}model.embed_tokens.weight": torch.ones(213, 48)}
        adapter = make_adapter(tmp_path / "grown", load(tiny_checkpoint), extra=grown)
        with pytest.raises(AdapterMismatchError, match=r"\[211, 48\] in the base, \[213, 48\]"):
            export(tiny_checkpoint, tmp_path / "out", adapter)

    def test_outputs_that_must_not_be_written(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "in" / "adapter", load(tiny_checkpoint))
        full = tmp_path / "full"
        full.mkdir()
        (full / "precious").write_text("x")
        with pytest.raises(OutputError, match="not empty"):
            export(tiny_checkpoint, full, adapter)
        for out in (adapter, tmp_path / "in"):
            with pytest.raises(OutputError, match="holds the input"):
                export(tiny_checkpoint, out, adapter, overwrite=True)
        link = tmp_path / "link"
        link.symlink_to(tiny_checkpoint)
        with pytest.raises(OutputError, match="holds the input"):
            export(tiny_checkpoint, link, adapter, overwrite=True)
        assert (adapter / WEIGHTS_FILE).is_file() and (full / "precious").is_file()
        export(tiny_checkpoint, full, adapter, overwrite=True)
        assert not (full / "precious").exists() and (full / SINGLE_FILE).is_file()

    def test_missing_and_broken_inputs(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no adapter folder"):
            export(tiny_checkpoint, tmp_path / "out", tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            export(tmp_path / "nowhere", tmp_path / "out")
        base = tmp_path / "base"
        export(tiny_checkpoint, base)
        raw = (base / SINGLE_FILE).read_bytes()
        (base / SINGLE_FILE).write_bytes(raw[: len(raw) * 2 // 3])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            export(base, tmp_path / "out")
        (base / SINGLE_FILE).write_bytes(raw)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
        )
        with pytest.raises(CheckpointError, match=r"already quantized \(bitsandbytes\)"):
            export(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"format": "gguf"}, "not available yet"),
            ({"format": "safetensor"}, "format must be one of"),
            ({"base_precision": "4bit"}, "base_precision must be one of original, dequantized"),
            ({"dtype": "int8"}, "dtype must be one of"),
            ({"max_shard_size": "big"}, "max_shard_size"),
        ],
    )
    def test_options(self, tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            export(tiny_checkpoint, tmp_path / "out", **options)

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1"])
    def test_weights(self, tiny_checkpoint: Path, tmp_path: Path, weight: Any) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        with pytest.raises(ConfigError, match="must be a finite number"):
            export(tiny_checkpoint, tmp_path / "out", {adapter: weight})

    def test_result_out_of_range_of_fp16(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        with pytest.raises(CheckpointError, match="out of range"):
            export(tiny_checkpoint, tmp_path / "out", {adapter: 1e7}, dtype="float16")
        assert not (tmp_path / "out").exists()

    def test_full_disk_leaves_nothing(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        write = checkpoint_dir._write_shard

        def half(file: Any, *rest: Any) -> None:
            write(file, *rest)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint_dir, "_write_shard", half)
        with pytest.raises(OutputError, match="disk is full"):
            export(tiny_checkpoint, tmp_path / "out", adapter)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_gguf_base_is_unpacked_first(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the door: that GGUF files are read right is the loader's test."""
    asked: list[Path] = []

    def materialize(path: Path, out: Path) -> Path:
        asked.append(path)
        export(tiny_checkpoint, out)
        return out

    monkeypatch.setattr("qlora_compile.runtime.models.materialize", materialize)
    (tmp_path / "model.gguf").touch()
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    export(tmp_path / "model.gguf", tmp_path / "a", adapter, verify=True)
    export(tiny_checkpoint, tmp_path / "b", adapter)
    assert asked == [tmp_path / "model.gguf"]
    assert (tmp_path / "a" / SINGLE_FILE).read_bytes() == (tmp_path / "b" / SINGLE_FILE).read_bytes()


def bitsandbytes_folder(base: Path, out: Path, quant: dict[str, Any]) -> Path:
    """What stock transformers + bitsandbytes write for the same weights."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant["quant_type"],
        bnb_4bit_use_double_quant=quant["double_quant"],
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(out)
    return out


class TestNF4:
    @pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)])
    def test_bytes_are_those_of_bitsandbytes(
        self, tiny_checkpoint: Path, tmp_path: Path, quant_type: str, double_quant: bool
    ) -> None:
        pytest.importorskip("bitsandbytes")
        quant = {"quant_type": quant_type, "double_quant": double_quant}
        result = export(tiny_checkpoint, tmp_path / "ours", format="nf4", quant=quant, report=True)
        ours = weights_of(tmp_path / "ours")
        theirs = weights_of(bitsandbytes_folder(tiny_checkpoint, tmp_path / "theirs", quant))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
        # 4 bits of a normal distribution: a relative error of about 0.09 (nf4) to 0.13 (fp4).
        assert len(result.layers) == 21 and all(0.05 < layer.relative < 0.2 for layer in result.layers)

    def test_stock_transformers_loads_it_and_computes_the_same(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        """Rows of whole blocks: bitsandbytes 0.50.2 dequantizes others wrong on CPU."""
        pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM

        source = tiny_llama(torch.bfloat16, hidden_size=192, intermediate_size=128, head_dim=64)
        base = save_base(tmp_path / "base", source)
        adapter = make_adapter(tmp_path / "adapter", source)
        export(base, tmp_path / "out", adapter, format="nf4", max_shard_size="50KB")
        export(base, tmp_path / "dense", adapter, dtype="float32")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "dense", "out"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(model.lm_head) is torch.nn.Linear
        assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
        reference = load(tmp_path / "dense")
        for name, module in reference.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.data = quantize_4bit(module.weight.data).dequantize()
        got, wanted = logits(model).float(), logits(reference)
        # bitsandbytes computes in bfloat16 (eps 2^-7), the reference in fp32 with the same 4-bit values.
        assert (got - wanted).norm() < 4 * 2**-7 * wanted.norm()
        assert (logits(load(base)) - wanted).norm() > 0.3 * wanted.norm()

    def test_conv1d_is_stored_as_out_by_in(self, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(n_embd=36, n_layer=1, n_head=3, vocab_size=97, n_positions=32, n_inner=60)
        base = save_base(tmp_path / "base", transformers.GPT2LMHeadModel(config).bfloat16())
        quant = {"quant_type": "nf4", "double_quant": True}
        export(base, tmp_path / "ours", format="nf4", quant=quant)
        ours = weights_of(tmp_path / "ours")
        theirs = weights_of(bitsandbytes_folder(base, tmp_path / "theirs", quant))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_verify_is_refused(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="use report=True instead"):
            export(tiny_checkpoint, tmp_path / "out", format="nf4", verify=True)
        assert not (tmp_path / "out").exists()


MEASURE = """
import sys
from pathlib import Path
from qlora_compile.runtime.export import export

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

small, small_adapter, base, adapter, out = map(Path, sys.argv[1:])
export(small, out / "warm", small_adapter)  # what a first call leaves behind is not what is measured
before, seen = anonymous_bytes(), []
export(base, out / "big", adapter, progress=lambda done, total: seen.append(anonymous_bytes()))
print(max(seen) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see anonymous memory")
def test_memory_is_a_few_tensors_whatever_the_size_of_the_base(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: what this one has freed before would be used again and not be seen."""
    count, shape = 30, (1021, 2050)
    keys = [f"layers.{i:02d}.weight" for i in range(count)]
    base = tmp_path / "base"
    base.mkdir()
    save_file({key: torch.randn(shape).bfloat16() for key in keys}, base / SINGLE_FILE)
    factors = {"A": torch.randn(2, shape[1]), "B": torch.randn(shape[0], 2)}
    tensors = {
        f"{PREFIX}{key.removesuffix('.weight')}.lora_{x}.weight": t.clone() for key in keys for x, t in factors.items()
    }
    adapter = write_adapter(tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "target_modules": ["x"]}, tensors)
    small = make_adapter(tmp_path / "small", load(tiny_checkpoint))
    paths = map(str, (tiny_checkpoint, small, base, adapter, tmp_path))
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    tensor_bytes, base_bytes = 2 * shape[0] * shape[1], 2 * shape[0] * shape[1] * count
    # A tensor, its result, and what the allocator has not returned yet: 9 tensors' size was measured. All would be 30.
    assert tensor_bytes < int(done.stdout) < base_bytes / 2
