"""Merging an adapter into a checkpoint on disk: `export` against peft's `merge_and_unload` + `save_pretrained`.

    python benchmarks/merge.py [--hidden 2048] [--layers 12] [--json results.json]

Both read the same random bf16 Llama in safetensors and the same LoRA adapter (r=16, all linears), and write a checkpoint
that stock transformers loads. Each runs in a process of its own, alternately; times are without the imports, memory is
the largest RssAnon above what it was after them. Then errors: of each folded weight against the fp64 sum, in units in
the last place of bf16, and of two adapters combined by peft and by us, relative to the exact weighted sum.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import resident_bytes, write_results
from limits import entry, show_limits
from torch import nn

LIMIT = 0.5  # of peft's time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("WHO", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(merge(*options.worker)))
        return
    folder = Path(__file__).parents[1] / "build" / f"merge_{options.hidden}_{options.layers}"
    if not (folder / "done").exists():
        make_inputs(folder, options.hidden, options.layers)
    runs: dict[str, list[dict[str, float]]] = {"qlora-compile": [], "peft": []}
    for _ in range(options.repeats):
        for who, found in runs.items():
            found.append(in_own_process(who, folder))
    size_mb = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) / 1e6
    results: dict[str, Any] = {"checkpoint_mb": round(size_mb), "merge": {}}
    for who, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        peak_mb = max(run["peak_mb"] for run in found)
        errors = fold_errors(folder, folder / f"out_{who}")
        results["merge"][who] = {"seconds": seconds, "mb_per_s": size_mb / seconds, "peak_mb": peak_mb, **errors}
        print(f"{who:14} {seconds:6.2f} s  {size_mb / seconds:6.0f} MB/s  peak {peak_mb:6.0f} MB  "
              f"worst error {errors['worst_ulp']:.3f} ulp  relative {errors['relative']:.2e}")  # fmt: skip
    ours, theirs = results["merge"]["qlora-compile"], results["merge"]["peft"]
    results["time_ratio"], results["memory_ratio"] = (ours[k] / theirs[k] for k in ("seconds", "peak_mb"))
    show_limits(
        [
            entry("seconds, ours / peft's", results["time_ratio"], at_most=LIMIT),
            entry("memory", results["memory_ratio"]),
        ]
    )
    results["combine"] = combine_errors()
    write_results(options.json, {"hidden": options.hidden, "layers": options.layers, "r": 16}, results)
    for name in runs:
        shutil.rmtree(folder / f"out_{name}")


def make_inputs(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama and an adapter whose B is not zero, both in `folder`."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base", max_shard_size="500MB")
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder / "adapter")
    (folder / "done").touch()


def in_own_process(who: str, folder: Path) -> dict[str, float]:
    out = folder / f"out_{who}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", who, str(folder), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.strip().splitlines()[-1])


def merge(who: str, folder: str, out: str) -> dict[str, float]:
    """One merge in this process: seconds, and the peak of anonymous memory above what the imports took."""
    import peft
    from transformers import AutoModelForCausalLM

    from qlora_compile.runtime.export import export

    with peak_memory() as peak:
        start = time.perf_counter()
        if who == "peft":
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
            model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter").merge_and_unload()
            model.save_pretrained(out, max_shard_size="500MB")
        else:
            export(f"{folder}/base", out, f"{folder}/adapter", max_shard_size="500MB")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": max(peak) / 1e6}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes of RssAnon above those at the start, sampled every few milliseconds."""
    start, found, done = resident_bytes("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.003):
            found.append(resident_bytes("RssAnon") - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    yield found
    done.set()
    thread.join()


def fold_errors(folder: Path, out: Path) -> dict[str, float]:
    """Of three layers' folded weights against fp64: the worst in bf16 units in the last place, and all in 2-norms."""
    from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
    from qlora_compile.runtime.formats.peft_files import read_adapter

    base, written, worst, error, norm = open_checkpoint(folder / "base"), open_checkpoint(out), 0.0, 0.0, 0.0
    for module, layer in list(read_adapter(folder / "adapter").layers().items())[:21]:
        key = f"{module}.weight"
        exact = base.tensor(key).double() + layer.scaling * (layer.b.double() @ layer.a.double())
        difference = (written.tensor(key).double() - exact).abs()
        unit = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp_min(1e-30))) - 7)  # 8 significant bits
        worst = max(worst, float((difference / unit).max()))
        error, norm = error + float(difference.square().sum()), norm + float(exact.square().sum())
    return {"worst_ulp": worst, "relative": (error / norm) ** 0.5}


def combine_errors() -> dict[str, dict[str, float]]:
    """0.7 law + 0.4 medicine, rank 8, alpha 16: |B'A' - D| / |D| of peft's methods and of ours; D is the exact sum."""
    import tempfile

    import peft

    from qlora_compile.runtime.combine_folders import combine_folders
    from qlora_compile.runtime.formats.peft_files import read_adapter

    torch.manual_seed(1)
    weights, table = {"law": 0.7, "medicine": 0.4}, {}
    model: Any = nn.Sequential(nn.Linear(300, 200))
    for number, name in enumerate(weights):
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
        model = peft.get_peft_model(model, config, name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
    layer = model.base_model.model[0]
    exact = sum(
        w * 2.0 * (layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double()) for n, w in weights.items()
    )
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        for method in ("cat", "svd", "linear"):
            options = {"svd_rank": 16} if method == "svd" else {}
            model.add_weighted_adapter(
                list(weights), list(weights.values()), method, combination_type=method, **options
            )
            theirs = layer.get_delta_weight(method).detach().double()
            out = Path(temporary) / f"out_{method}"
            rank = 16 if method == "svd" else None
            combine_folders({f"{temporary}/{n}": w for n, w in weights.items()}, out, method, rank=rank)
            ours = read_adapter(out).layers()["0"]
            found = {"qlora-compile": ours.scaling * (ours.b.double() @ ours.a.double()), "peft": theirs}
            table[method] = {
                who: float((delta - exact).detach().norm() / exact.detach().norm()) for who, delta in found.items()
            }
            print(f"combine {method:7}", ", ".join(f"{who} {error:.1e}" for who, error in table[method].items()))
    return table


if __name__ == "__main__":
    main()
