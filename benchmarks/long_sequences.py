"""Peak memory of one training step as the sequence grows, 1k to 16k tokens, ours beside the peer.

    python benchmarks/long_sequences.py [--tokens 1024,2048,4096,8192,16384] [--contenders ours,bitsandbytes] [--json FILE]

A small Llama shape with random bf16 weights, batch 1, LoRA r=16 on all linears, compiled by Inductor with dynamic
shapes; ours with `keep_logits=False`. Each length in a process of its own. The first step compiles; the peak is the
resident memory's high-water mark over the second, above the resident memory before the first. What compiling leaves
behind is in it and the same at every length, so growth is what to read: the bytes that each further token costs. That is
a constant where memory is linear in tokens, and doubles with the length where it is quadratic.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import load_peer, resident_bytes, write_results

CONTENDERS = ("ours", "bitsandbytes")
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 16384}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def write_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, **HEADS, max_position_embeddings=65536, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def build(contender: str, folder: str) -> Any:
    """The compiled model; dynamic, so that one compilation in the shared cache serves all lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    import qlora_compile

    if contender == "ours":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        qlora_compile.prepare(model, qlora_compile.QLoRAConfig(keep_logits=False))
    else:
        model = load_peer(folder, 16)
    model.config.use_cache = False
    backend = "qlora" if contender == "ours" else "inductor"
    return torch.compile(model.train(), backend=backend, dynamic=True)


def worker(contender: str, tokens: int, folder: str) -> None:
    import torch

    compiled = build(contender, folder)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        return time.perf_counter() - begin, loss.item()

    before = resident_bytes()
    step()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
    seconds, loss = step()
    peak = resident_bytes("VmHWM") - before
    print("ANSWER " + json.dumps({"peak_mb": peak / 1e6, "step_s": seconds, "loss": loss}))


def measure(contender: str, tokens: int, folder: str, caches: str) -> dict[str, Any] | None:
    """The worker's answer; None where it ended without one (out of memory)."""
    command = [sys.executable, __file__, "--worker", contender, "--tokens", str(tokens), "--model", folder]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch",
        "QLORA_COMPILE_CACHE_DIR": f"{caches}/ours",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER "):
            answer: dict[str, Any] = json.loads(line[7:])
            return answer
    print(f"{contender}, {tokens} tokens: the worker ended (exit code {done.returncode}): {done.stderr[-200:]}")
    return None


def add_growth(rows: dict[int, dict[str, Any]]) -> None:
    """bytes_per_token: what each token beyond the length before costs; growth: that, over the one before (1: linear)."""
    lengths = sorted(rows)
    for shorter, longer in pairwise(lengths):
        more = rows[longer]["peak_mb"] - rows[shorter]["peak_mb"]
        rows[longer]["bytes_per_token"] = more * 1e6 / (longer - shorter)
        if "bytes_per_token" in rows[shorter]:
            rows[longer]["growth"] = rows[longer]["bytes_per_token"] / rows[shorter]["bytes_per_token"]


def report(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"peak memory of a training step, hidden {SHAPE['hidden_size']}, batch 1")
    for column in ("", "tokens", "peak MB", "/ half the tokens", "kB a further token", "/ before", "/ bnb", "step s"):
        table.add_column(column)
    for contender, rows in results.items():
        for tokens, row in rows.items():
            half, peer = rows.get(tokens // 2), results.get("bitsandbytes", {}).get(tokens)
            cells = [f"{row['peak_mb']:.0f}", f"{row['peak_mb'] / half['peak_mb']:.2f}" if half else ""]
            cells += [f"{row['bytes_per_token'] / 1e3:.0f}" if "bytes_per_token" in row else ""]
            cells += [f"{row['growth']:.2f}" if "growth" in row else ""]
            cells += [f"{row['peak_mb'] / peer['peak_mb']:.2f}" if peer else "", f"{row['step_s']:.1f}"]
            table.add_row(contender, str(tokens), *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,2048,4096,8192,16384")
    parser.add_argument("--contenders", default="ours,bitsandbytes", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, int(arguments.tokens), arguments.model)
        return
    results: dict[str, dict[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        for contender in arguments.contenders.split(","):
            rows = results[contender] = {}
            for tokens in map(int, arguments.tokens.split(",")):
                answer = measure(contender, tokens, f"{folder}/model", f"{folder}/{contender}")
                if answer is None:
                    break
                rows[tokens] = answer
                print(f"{contender}, {tokens} tokens: {answer['peak_mb']:.0f} MB, {answer['step_s']:.1f} s", flush=True)
            add_growth(rows)
    report(results)
    write_results(arguments.json, {"shape": SHAPE | HEADS, "batch": 1, "rank": 16, "dtype": "bfloat16"}, results)


if __name__ == "__main__":
    main()
