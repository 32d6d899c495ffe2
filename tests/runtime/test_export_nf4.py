"""Export to 4 bits: the bytes are those of bitsandbytes, and stock transformers computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.errors import CheckpointError, ConfigError
from qlora_compile.runtime import export_write
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.tensor import quantize_4bit

MakeModel = Callable[..., torch.nn.Module]
MakeAdapter = Callable[..., Path]
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

    def test_stock_transformers_loads_it_and_computes_the_same(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
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

    @pytest.mark.parametrize("weights", [(1.0,), (0.6, -0.5)])
    def test_verify_quantizes_base_and_adapters(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter, weights: tuple[float, ...],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        pytest.importorskip("bitsandbytes")
        source = tiny_llama(torch.bfloat16, hidden_size=192, intermediate_size=128, head_dim=64)
        base = save_base(tmp_path / "base", source)
        targets = ("q_proj", "down_proj", "embed_tokens")
        adapters = {make_adapter(tmp_path / f"a{i}", source, seed=i, targets=targets): w for i, w in enumerate(weights)}
        result = export(base, tmp_path / "out", adapters, format="nf4", verify=True).verification
        assert result is not None and result.relative < 5e-3 < 0.05 < (result.quantization or 0)
        assert result.reference.endswith("quantized to nf4") and "The 4 bits change them by" in result.sentence()
        # On top of what is in 4 bits already: adapters that follow one another.
        second = make_adapter(tmp_path / "second", source, seed=9)
        again = export(tmp_path / "out", tmp_path / "dense", second, base_precision="dequantized", verify=True)
        assert again.verification is not None and again.verification.relative < 0.02 < (again.verification.effect or 0)
        once = export_write._quantize_one

        def other(job: Any, key: str, *rest: Any) -> Any:
            return once(job, key.replace("up_proj", "gate_proj"), *rest)

        monkeypatch.setattr(export_write, "_quantize_one", other)
        with pytest.raises(CheckpointError, match="does not compute what base"):
            export(base, tmp_path / "wrong", adapters, format="nf4", verify=True)

    def test_a_model_in_memory_cannot_be_verified_in_4_bits(self, tmp_path: Path, tiny_llama: MakeModel) -> None:
        with pytest.raises(ConfigError, match="verify needs a base in a folder: name it with base="):
            export(tiny_llama(), tmp_path / "out", format="nf4", verify=True)
        assert not (tmp_path / "out").exists()

    def test_a_correction_takes_back_part_of_the_error(
        self, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        """On weights with directions to find: random ones have none. Stock peft puts it onto the 4-bit model."""
        peft = pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM

        source = tiny_llama(torch.bfloat16, hidden_size=192, intermediate_size=128, head_dim=64)
        base = save_base(tmp_path / "base", source)
        adapter = make_adapter(tmp_path / "adapter", source)
        result = export(base, tmp_path / "out", adapter, format="nf4", report=True, correction_rank=48)
        corrected = {layer.name: layer.relative for layer in result.corrected}
        assert len(corrected) == len(result.layers) == 21
        assert all(corrected[layer.name] < 0.9 * layer.relative for layer in result.layers)
        export(base, tmp_path / "dense", adapter, dtype="float32")
        wanted = logits(load(tmp_path / "dense"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        plain = (logits(model).float() - wanted).norm()
        better = (
            logits(peft.PeftModel.from_pretrained(model, tmp_path / "out" / "correction")).float() - wanted
        ).norm()
        assert better < 0.95 * plain
        with pytest.raises(ConfigError, match="correction_rank is a rank of at least 1, for format='nf4', got 4"):
            export(base, tmp_path / "other", adapter, correction_rank=4)
