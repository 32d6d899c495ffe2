"""Memory of loading, preparing and exporting a checkpoint much larger than its 4-bit form.

Anonymous memory is what counts: pages of a mapped file can be dropped, a dense copy of a weight can not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_compile.runtime.formats.checkpoint_dir import TensorSpec, write_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 1000}
EXPERTS = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10, "vocab_size": 1000}
GIGABYTE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 9, "vocab_size": 32000}

# job, base, adapter, out -> anonymous memory at its peak above that before the job, and the bytes of the 4-bit model
MEASURE = """
import sys, threading, time, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import qlora_compile as qc
import qlora_compile.runtime.export
from qlora_compile.runtime.finetune import FinetuneConfig, finetune
from qlora_compile.runtime.reporters import SilentReporter
job, base, adapter, out = sys.argv[1:]
qc.quantize_4bit(torch.randn(64, 64))  # builds the kernel
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
if job == "from_pretrained":
    quantized = qc.QLoRAQuantizationConfig()
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantized, dtype="auto")
elif job == "prepare":
    model = qc.prepare(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), qc.QLoRAConfig(r=8))
elif job == "finetune":
    model, qlora = None, qc.QLoRAConfig(r=1, compute_dtype="float32")
    run = {"model": base, "data": "texts", "eval_data": "texts", "steps": 1, "seq_len": 11, "compile": False}
    finetune(FinetuneConfig(out=out, qlora=qlora, **run), SilentReporter())
else:
    model = None
    qc.export(base, out, {adapter: 1.0})
done = True; thread.join()
params = model.parameters() if model is not None else []
print(peak - start, sum(p.stored_bytes if isinstance(p, qc.QuantizedTensor) else p.nbytes for p in params))
"""


def random_llama(path: Path, dtype: torch.dtype, **settings: Any) -> tuple[torch.nn.Module, int, int]:
    """Random weights written tensor by tensor -> (the model on meta, bytes of all, bytes of the largest)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(tie_word_embeddings=True, **settings)
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if key != "lm_head.weight"}
    specs = {key: TensorSpec(dtype, shape) for key, shape in shapes.items()}
    path.mkdir()
    config.save_pretrained(path)
    write_checkpoint(path, specs, lambda key: torch.randn(specs[key].shape, dtype=dtype) * 0.02, 300_000_000)
    return model, sum(spec.nbytes for spec in specs.values()), max(spec.nbytes for spec in specs.values())


def measure(folder: Path, job: str) -> tuple[int, int]:
    """(peak, 4-bit bytes) of a job in a process of its own: memory freed before would be used again unseen."""
    run = [sys.executable, "-c", MEASURE, job, str(folder / "base"), str(folder / "adapter"), str(folder / job)]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=500, cwd=folder)
    peak, stored = map(int, out.stdout.split()[-2:])
    return peak, stored


JOBS = ("from_pretrained", "prepare", "export")


def check(
    folder: Path,
    model: torch.nn.Module,
    largest: int,
    spare: int,
    below: float,
    make_adapter: Any,
    jobs: tuple[str, ...] = JOBS,
) -> None:
    """Each job's peak <= the 4-bit size + 2 x the largest dense tensor + `spare`, which is less than `below`."""
    make_adapter(folder / "adapter", model, r=8)
    quantized = 0
    for job in jobs:
        peak, stored = measure(folder, job)
        quantized = (
            stored if job == "from_pretrained" else quantized
        )  # of the base alone; an export's result is on disk
        bound = max(stored, quantized) + 2 * largest + spare
        print(f"{job}: peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB, dense {below / 1e6:.0f} MB")
        assert peak <= bound < below, (job, peak, bound, below)


def test_nothing_dense_outlives_its_tensor(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    """60 MB are for the allocator, threads and modules."""
    model, total, largest = random_llama(tmp_path / "base", torch.float32, num_attention_heads=8, **SMALL)
    check(tmp_path, model, largest, 60_000_000, total / 2, make_adapter)


@pytest.mark.slow
def test_fused_experts_are_streamed_too(
    tmp_path: Path, make_adapter: Callable[..., Path], tiny_checkpoint: Path, texts: Path
) -> None:
    """The checkpoint has three tensors for each expert; what counts as the largest is what two of them become, [2048, 512].

    `finetune` evaluates the dense model too, which takes the experts of one layer at a time.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(num_attention_heads=8, **EXPERTS))
    largest, total = model.model.layers[0].mlp.experts.gate_up_proj[0].nbytes, sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    model = model.to("meta")
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    shutil.copytree(texts, tmp_path / "texts")
    check(tmp_path, model, largest, 60_000_000, total / 2, make_adapter, ("from_pretrained", "export", "finetune"))


@pytest.mark.slow
def test_peak_memory_of_a_gigabyte(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    model, total, largest = random_llama(tmp_path / "base", torch.bfloat16, num_attention_heads=16, **GIGABYTE)
    assert total > 1_000_000_000
    check(tmp_path, model, largest, 300_000_000, total, make_adapter)
