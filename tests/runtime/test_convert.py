"""Dense <-> 4-bit folders: `convert`, a bitsandbytes folder as the base of an export, and `export --combine`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.cli import main
from qlora_compile.errors import CheckpointError
from qlora_compile.runtime.combine_folders import combine_folders
from qlora_compile.runtime.export import export
from qlora_compile.runtime.fold import LoraTerm, fold
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.formats.peft_files import read_adapter
from qlora_compile.tensor import quantize_4bit

MakeAdapter = Callable[..., Path]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key).clone() for key in checkpoint.specs}


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def gpt2_folder(path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=36, n_layer=1, n_head=3, vocab_size=97, n_positions=32, n_inner=60)
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["llama", "conv1d"])
def test_to_four_bits_and_back(
    tmp_path: Path, tiny_checkpoint: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_checkpoint if kind == "llama" else gpt2_folder(tmp_path / "base")
    four, dense = tmp_path / "four", tmp_path / "dense"
    arguments = ["--block-size", "128", "--no-double-quant", "--json"]
    assert main(["convert", "--model", str(base), "--out", str(four), "--to", "nf4", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["format"] == "nf4" and (four / "tokenizer.json").is_file() == (kind == "llama")
    assert main(["convert", "--model", str(four), "--out", str(dense), "--to", "dense"]) == 0
    assert "converting: " in capsys.readouterr().err
    before, after = weights_of(base), weights_of(dense)
    assert before.keys() == after.keys()
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"]
    changed = 0
    for key, weight in before.items():
        quantized = f"{key}.quant_map" in open_checkpoint(four).specs
        transposed = kind == "conv1d"
        options: dict[str, Any] = {"block_size": 128, "double_quant": False, "transposed": transposed}
        wanted = quantize_4bit(weight, **options).dequantize() if quantized else weight
        assert torch.equal(after[key], wanted), key
        changed += quantized
    assert changed == (21 if kind == "llama" else 4)
    load(dense)  # stock transformers


def test_a_four_bit_folder_is_a_base(tmp_path: Path, tiny_checkpoint: Path, make_adapter: MakeAdapter) -> None:
    """One adapter folded and requantized, then the next on the result: `sequential` with requantization between."""
    model = load(tiny_checkpoint)
    first, second = (make_adapter(tmp_path / name, model, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    export(tiny_checkpoint, tmp_path / "one", first, format="nf4")
    with pytest.raises(CheckpointError, match=r"already quantized \(bitsandbytes\).*base_precision='dequantized'"):
        export(tmp_path / "one", tmp_path / "two", second)
    result = export(tmp_path / "one", tmp_path / "two", {second: 0.5}, base_precision="dequantized", report=True)
    key = "model.layers.1.mlp.down_proj.weight"
    layers = [read_adapter(folder).layers()["model.layers.1.mlp.down_proj"] for folder in (first, second)]
    terms = [LoraTerm(layer.a, layer.b, layer.scaling * weight) for layer, weight in zip(layers, (1, 0.5))]
    # Quantized from the fp32 sum, but what it dequantizes to is the base's bfloat16.
    folded = quantize_4bit(fold(weights_of(tiny_checkpoint)[key], terms[:1], dtype=torch.float32)).dequantize()
    wanted = fold(folded.to(torch.bfloat16), terms[1:])
    assert torch.equal(weights_of(tmp_path / "two")[key], wanted)
    assert len(result.layers) == 6 and result.base_precision == "dequantized"


def test_other_quantizations_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    base = tmp_path / "base"
    export(tiny_checkpoint, base)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by gptq; only bitsandbytes' 4-bit folders are read"):
        export(base, tmp_path / "out", base_precision="dequantized")
    assert not (tmp_path / "out").exists()


def test_convert_on_wrong_use(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--to"]
    assert main([*arguments, "nf5"]) == 2 and "did you mean 'nf4'" in capsys.readouterr().err
    assert main([*arguments, "nf4", "--block-size", "100"]) == 2 and "block_size must be" in capsys.readouterr().err
    for option in (["--block-size", "48"], ["--no-double-quant"], ["--quant-type", "fp4"]):
        assert main([*arguments, "dense", *option]) == 2
        assert re.search(r"--[a-z]+-[a-z]+ is for --to nf4, and --to is dense", capsys.readouterr().err)
    assert main([*arguments[:-2], f"{tmp_path}/out.gguf", "--to", "dense"]) == 2
    assert "out.gguf names a GGUF file, but format is 'safetensors'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_folds_what_combine_makes(
    tmp_path: Path, tiny_checkpoint: Path, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_checkpoint)
    a, b = (str(make_adapter(tmp_path / name, model, seed=seed)) for name, seed in (("a", 1), ("b", 2)))
    base = ["export", "--base", str(tiny_checkpoint), "--adapter", f"{a}=0.7", "--adapter", f"{b}=-0.4"]
    page = tmp_path / "export.html"
    options = ["--combine", "svd", "--rank", "2", "--dtype", "float32", "--json", "--html", str(page)]
    assert main([*base, "--out", str(tmp_path / "out"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == {a: 0.7, b: -0.4}
    text = page.read_text()
    assert "6 folded and 23 copied tensors" in text and text.count("<tr><td>model.layers.") == 6
    assert f"{a} × 0.7" in text and "with the correction" not in text
    combine_folders({a: 0.7, b: -0.4}, tmp_path / "both", "svd", rank=2)
    export(tiny_checkpoint, tmp_path / "wanted", tmp_path / "both", dtype="float32")
    got, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "wanted")
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert main([*base, "--out", str(tmp_path / "other"), "--rank", "2"]) == 2
    assert "--rank is for --combine" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_first(
    tmp_path: Path, tiny_checkpoint: Path, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = make_adapter(tmp_path / "adapter", load(tiny_checkpoint)), tmp_path / "out"
    arguments = ["export", "--base", str(tiny_checkpoint), "--adapter", str(adapter), "--out", str(out), "--html"]
    (tmp_path / "file").write_text("x")
    for page in (out / "config.json", out / "deep" / "page.html", out, tmp_path, tmp_path / "file" / "page.html"):
        assert main([*arguments, str(page)]) == 2
        assert re.search(r"would lie in the output|cannot be written", capsys.readouterr().err)
    assert not out.exists()
    assert main([*arguments, str(tmp_path / "new" / "page.html")]) == 0 and (tmp_path / "new" / "page.html").is_file()


TERMINATED = """
import os, signal, sys
from qlora_compile.runtime import export_write
from qlora_compile.cli import main
made = export_write._rounded
def terminate(key, tensor, dtype):
    if "layers.1" in key:
        os.kill(os.getpid(), signal.SIGTERM)
    return made(key, tensor, dtype)
export_write._rounded = terminate
sys.exit(main(["convert", "--model", sys.argv[1], "--out", sys.argv[2], "--to", "dense"]))
"""


def test_a_4_bit_output_s_name_is_utf_8(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors opens no other file, and the parts of a 4-bit output are read again."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")
    assert main(["convert", "--model", str(tiny_checkpoint), "--to", "nf4", "--out", out]) == 2
    assert "has a name that is not UTF-8" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert main(["convert", "--model", str(tiny_checkpoint), "--to", "dense", "--out", out]) == 0


def test_sigterm_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-c", TERMINATED, str(tiny_checkpoint), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "error: interrupted." in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_adapter_is_read_only_when_asked(
    tmp_path: Path, tiny_checkpoint: Path, make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", load(tiny_checkpoint))
    export(tiny_checkpoint, tmp_path / "wanted", adapter)
    torch.save(read_adapter(adapter).tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    arguments = ["export", "--base", str(tiny_checkpoint), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "is a pickle; save it as safetensors, or pass allow_pickle" in capsys.readouterr().err
    assert main([*arguments, "--allow-pickle"]) == 0
    got, wanted = weights_of(tmp_path / "out"), weights_of(tmp_path / "wanted")
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_what_a_conversion_counts(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantized tensors are no copies; without an adapter there is nothing that a base precision is about."""
    arguments = ["convert", "--model", str(tiny_checkpoint), "--to", "nf4", "--out", str(tmp_path / "nf4")]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "21 quantized and 8 copied tensors" in said.out and "base precision" not in said.out
    lines = said.err.splitlines()
    assert lines and len(set(lines)) == len(lines) and re.fullmatch(r"converting: (\d+) of \1 kB", lines[-1])


@pytest.mark.parametrize(
    "command",
    [
        "convert --model {0}/g.gguf --to dense --out {0}/out",
        "export --base {0}/none --adapter {0}/none --out {0}/out",
        "export --base {1} --adapter {1} --out {0}/out",
        "combine --adapter {0}/none --out {0}/out",
        "inspect {0}/none",
        "estimate {0}/none",
        "finetune --model {1} --data {0}/none --out {0}/out",
        "finetune --model {0}/none --data {1} --out {0}/out",
        "runs list --store {0}/none",
    ],
)
def test_a_path_to_nothing_is_wrong_use(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(command.format(tmp_path, tiny_checkpoint).split()) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said or str(tiny_checkpoint) in said
    assert "g.gguf" not in command or "There is no model folder or .gguf file" in said
