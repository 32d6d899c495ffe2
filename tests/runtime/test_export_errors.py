"""Export: verification and bad input: one sentence each, and nothing is written."""

from __future__ import annotations

import json
import shutil
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
    OutputError,
)
from qlora_compile.runtime.export import export
from qlora_compile.runtime.fold import fold
from qlora_compile.runtime.formats import checkpoint_dir
from qlora_compile.runtime.formats.checkpoint_dir import SINGLE_FILE
from qlora_compile.runtime.formats.peft_files import PREFIX, WEIGHTS_FILE, write_adapter

MakeModel = Callable[..., torch.nn.Module]
MakeAdapter = Callable[..., Path]


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class TestVerify:
    def test_wrong_numbers_are_refused_and_not_written(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))

        def doubled(weight: torch.Tensor, terms: Any, **options: Any) -> torch.Tensor:
            return fold(weight, [*terms, *terms], **options)

        monkeypatch.setattr("qlora_compile.runtime.export_write.fold", doubled)
        with pytest.raises(CheckpointError, match="does not compute what base"):
            export(tiny_checkpoint, tmp_path / "out", adapter, verify=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]

    def test_several_weighted_adapters(self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter) -> None:
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

    def test_adapter_of_another_shape(
        self, tiny_checkpoint: Path, tmp_path: Path, tiny_llama: MakeModel, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", tiny_llama(hidden_size=66))
        with pytest.raises(AdapterMismatchError, match=r"down_proj.weight is \[48, 80\] in the base, \[66, 80\]"):
            export(tiny_checkpoint, tmp_path / "out", adapter)
        grown = {f"{PREFIX}model.embed_tokens.weight": torch.ones(213, 48)}
        adapter = make_adapter(tmp_path / "grown", load(tiny_checkpoint), extra=grown)
        with pytest.raises(AdapterMismatchError, match=r"\[211, 48\] in the base, \[213, 48\]"):
            export(tiny_checkpoint, tmp_path / "out", adapter)

    def test_outputs_that_must_not_be_written(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
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
        with pytest.raises(CheckpointError, match="no model folder"):
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
            ({"format": "gguf", "dtype": "int8"}, "dtype must be one of F32, F16, BF16, Q8_0"),
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
    def test_weights(self, tiny_checkpoint: Path, tmp_path: Path, weight: Any, make_adapter: MakeAdapter) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        with pytest.raises(ConfigError, match="must be a finite number"):
            export(tiny_checkpoint, tmp_path / "out", {adapter: weight})

    def test_result_out_of_range_of_fp16(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
        with pytest.raises(CheckpointError, match="out of range"):
            export(tiny_checkpoint, tmp_path / "out", {adapter: 1e7}, dtype="float16")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("format", ["safetensors", "nf4"])
    @pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
    def test_what_no_adapter_touches_out_of_range_of_fp16(
        self, tiny_checkpoint: Path, tmp_path: Path, key: str, format: str
    ) -> None:
        base = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
        tensors = load_file(base / SINGLE_FILE)
        tensors[key].view(-1)[5] = 7e4
        save_file(tensors, base / SINGLE_FILE, metadata={"format": "pt"})
        with pytest.raises(
            CheckpointError, match=rf"{key} would hold NaN or infinity as torch\.float16: .* out of range"
        ):
            export(base, tmp_path / "out", dtype="float16", format=format)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
        tensors[key].view(-1)[5] = float("inf")  # the base's own is copied, if nothing is rounded
        save_file(tensors, base / SINGLE_FILE, metadata={"format": "pt"})
        export(base, tmp_path / "out", format=format)

    def test_what_was_trained_in_full_out_of_range(
        self, tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter
    ) -> None:
        extra = {f"{PREFIX}model.norm.weight": torch.full((48,), 2.0)}
        adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint), targets=(), extra=extra)
        for weight, dtype in ((1e300, None), (1e5, "float16")):
            with pytest.raises(CheckpointError, match=r"model\.norm\.weight would hold NaN or infinity"):
                export(tiny_checkpoint, tmp_path / "out", {adapter: weight}, dtype=dtype)
        assert not (tmp_path / "out").exists()
        export(tiny_checkpoint, tmp_path / "out", {adapter: 1e4}, dtype="float16")

    def test_full_disk_leaves_nothing(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: MakeAdapter
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
