"""Cold and warm compile time, and the step after it, as the number of equal layers grows: flat, outlined, and the peer.

    python benchmarks/compile_time.py [--model DIR] [--rows outlined:4,outlined:30,flat:30,bitsandbytes:30] [--json FILE]

A row is a contender and a number of layers: the model cut to its first layers, or (more than it has, or `--hidden`) random
weights of its shape. Each row starts twice with caches of its own: in the first process everything is cold, in the second
both torch's caches and ours are warm. "compile" is the first step minus a median one, so that slow products do not blur it;
"start" is what a user waits for: the first step itself. Steps are taken in turns, so a busy minute hits all rows alike.
A second table says what bounds each start, by torch's own clocks of the same run: Dynamo's tracing and guards, our passes,
AOTAutograd (on a warm start: its key and the loading of what it kept), Inductor, the wait for the C++ compiler after
Inductor was done, the step itself; "other" is what is left, imports first of all.
An existing FILE is updated row by row: long tables can be measured in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Worker, load_peer, resident_bytes, smollm2, write_results
from limits import Found, entry, show_limits

PARTS = ("dynamo", "passes", "aot_autograd", "inductor", "cpp_wait", "step", "other")
CONTENDERS = ("outlined", "flat", "bitsandbytes")
ROWS = "outlined:4,outlined:12,outlined:30,flat:4,flat:12,flat:30,bitsandbytes:30"


def build(contender: str, layers: int, arguments: argparse.Namespace) -> tuple[Any, list[Any]]:
    """(compiled model, trainable parameters): LoRA on all linears but the head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import qlora_compile

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    config = AutoConfig.from_pretrained(arguments.model)
    if contender == "bitsandbytes":
        model = load_peer(arguments.model, 16, num_hidden_layers=layers, dtype=dtype)
    elif arguments.hidden or layers > config.num_hidden_layers:
        hidden = arguments.hidden or config.hidden_size
        heads = hidden // (config.hidden_size // config.num_attention_heads)
        config.update({"hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "num_hidden_layers": layers})
        config.update({"num_attention_heads": heads, "num_key_value_heads": 1, "layer_types": None})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, num_hidden_layers=layers)
    model.config.use_cache = False
    if contender != "bitsandbytes":
        model = qlora_compile.prepare(model, qlora_compile.QLoRAConfig(compute_dtype=dtype))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    if contender == "bitsandbytes":
        return torch.compile(model, backend="inductor"), trainable
    return torch.compile(model, backend="qlora", options={"outline_layers": contender == "outlined"}), trainable


def clocks(model: Any) -> dict[str, float]:
    """Seconds of this process's compilation so far, by who took them; no second is counted twice."""
    from torch._dynamo.utils import compilation_time_metrics

    import qlora_compile
    from qlora_compile.modules import prepared_state

    def took(*names: str) -> float:
        return sum(sum(compilation_time_metrics.get(name, ())) for name in names)

    ours = prepared_state(model) is not None
    passes = sum(done.ms for done in qlora_compile.explain(model).passes) / 1e3 if ours else 0.0
    inductor, wait = took("fx_codegen_and_compile"), took("async_compile.wait")
    backend = took("OutputGraph.call_user_compiler", "backward._backward_impl")
    return {
        "dynamo": took("bytecode_tracing", "build_guards"),
        "passes": passes,
        "aot_autograd": backend - passes - inductor,
        "inductor": inductor - wait,
        "cpp_wait": wait,
    }


def worker(row: str, arguments: argparse.Namespace) -> None:
    """Builds the row's model, then one step for each line read on standard input; answers one JSON line each."""
    import torch
    from torch._dynamo.utils import counters

    contender, layers = row.split(":")
    model, trainable = build(contender, int(layers), arguments)
    start_bytes = resident_bytes()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (arguments.batch, arguments.seq_len), generator=generator)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    for _ in sys.stdin:
        begin, cpu_begin = time.perf_counter(), sum(os.times()[:4])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        answer = {
            "seconds": time.perf_counter() - begin,
            "cpu_s": sum(os.times()[:4]) - cpu_begin,
            "loss": loss.item(),
            "parts": clocks(model),
            "peak_bytes": resident_bytes("VmHWM") - start_bytes,
            "cache": {key: value for key, value in counters["aot_autograd"].items() if "cache" in key}
            | {key: value for key, value in counters["inductor"].items() if "fxgraph_cache" in key},
        }
        print("STEP " + json.dumps(answer), flush=True)


class Row(Worker):
    """A worker process with cache folders of its own, stepped from here."""

    def __init__(self, name: str, argv: list[str], caches: str) -> None:
        self.times = list[float]()
        folders = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/torch", "QLORA_COMPILE_CACHE_DIR": f"{caches}/qlora"}
        super().__init__(name, __file__, argv, **folders)
        self.first = self.step()

    def step(self) -> dict[str, Any]:
        return self.ask("step")

    def turn(self, steps: int) -> None:
        """One step to warm the processor's caches, then `steps` that count."""
        self.step()
        for _ in range(steps):
            answer = self.step()
            self.times.append(answer["seconds"])
            self.last = answer


def measure(names: list[str], argv: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cold starts one after the other, steps in turns, then warm starts."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name in names:
            print(f"{name}: cold start ...", flush=True)
            rows.append(Row(name, argv, f"{folder}/{name.replace(':', '_')}"))
        for _ in range(arguments.turns):
            for row in rows:
                row.turn(arguments.steps)
        results = {}
        for row in rows:
            row.close()
            again = Row(row.name, argv, f"{folder}/{row.name.replace(':', '_')}")
            again.close()
            step, cpu_step = statistics.median(row.times), row.last["cpu_s"]
            cold, warm = row.first["seconds"] - step, again.first["seconds"] - step
            print(f"{row.name}: compile {cold:.1f} s cold, {warm:.1f} s warm; step {step:.3f} s", flush=True)
            results[row.name] = {
                "cold_start_s": row.first["seconds"],
                "cold_compile_s": cold,
                "warm_start_s": again.first["seconds"],
                "warm_compile_s": warm,
                "cold_compile_cpu_s": row.first["cpu_s"] - cpu_step,
                "warm_compile_cpu_s": again.first["cpu_s"] - cpu_step,
                "step_s": step,
                "step_min_s": min(row.times),
                "peak_mb": row.last["peak_bytes"] / 1e6,
                "loss_first": row.first["loss"],
                "loss_last": row.last["loss"],
                "warm_caches": again.first["cache"],
                "cold_parts_s": parts(row.first, step),
                "warm_parts_s": parts(again.first, step),
            }
        return results


def parts(first: dict[str, Any], step: float) -> dict[str, float]:
    """What a first step consists of, in seconds; "other" is what no clock saw."""
    known = first["parts"] | {"step": step}
    return known | {"other": first["seconds"] - sum(known.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a bf16 causal LM (default: SmolLM2-135M from its package)")
    parser.add_argument("--rows", default=ROWS, help="contender:layers, separated by commas")
    parser.add_argument(
        "--hidden", type=int, default=0, help="random weights of this hidden size (default: the model's)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of model and products")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="steps that count in each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments)
        return
    arguments.model = smollm2(arguments.model)
    names = arguments.rows.split(",")
    for name in names:
        contender, _, layers = name.partition(":")
        if contender not in CONTENDERS or not layers.isdigit():
            parser.error(f"a row is one of {', '.join(CONTENDERS)}, a colon and a number of layers, got {name!r}")
    argv = ["--model", arguments.model, "--batch", str(arguments.batch), "--seq-len", str(arguments.seq_len)]
    argv += ["--hidden", str(arguments.hidden), "--dtype", arguments.dtype]
    results = measure(names, argv, arguments)
    report(results, arguments)


def limits(results: dict[str, dict[str, Any]]) -> Iterator[Found]:
    """30 layers: our cold compile over the peer's, and our warm start over our cold one."""
    ours, peer = (results.get(f"{name}:30") for name in ("outlined", "bitsandbytes"))
    if ours and peer:
        ratio = ours["cold_compile_s"] / peer["cold_compile_s"]
        yield entry("cold compile of 30 layers, ours / bitsandbytes", ratio, at_most=0.35)
    if ours:
        yield entry("start of 30 layers, warm / cold", ours["warm_start_s"] / ours["cold_start_s"], at_most=0.35)


def report(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The table, with the ratios that matter where both of their rows are there; the JSON file if one is wanted."""
    from rich.console import Console
    from rich.table import Table

    if arguments.json is not None and arguments.json.exists():
        results = json.loads(arguments.json.read_text(encoding="utf-8"))["results"] | results
    table = Table(title=f"compile time, {arguments.batch}x{arguments.seq_len} tokens, r=16, all linears")
    for column in (
        "",
        "cold s",
        "/ 4 layers",
        "/ bnb",
        "warm s",
        "warm / cold start",
        "step s",
        "step / flat",
        "peak MB",
    ):
        table.add_column(column)

    def ratio(row: str, other: str, key: str) -> str:
        return f"{results[row][key] / results[other][key]:.2f}" if other in results else ""

    for name, r in results.items():
        contender, layers = name.split(":")
        cells = (f"{r['cold_compile_s']:.1f}", ratio(name, f"{contender}:4", "cold_compile_s"))
        cells += (ratio(name, f"bitsandbytes:{layers}", "cold_compile_s"), f"{r['warm_compile_s']:.1f}")
        cells += (f"{r['warm_start_s'] / r['cold_start_s']:.2f}", f"{r['step_s']:.3f}")
        table.add_row(name, *cells, ratio(name, f"flat:{layers}", "step_s"), f"{r['peak_mb']:.0f}")
    Console().print(table)
    bounds = Table(title="what bounds the start: seconds of the first step, cold and warm")
    for column in ("", "", "first step", *(part.replace("_", " ") for part in PARTS)):
        bounds.add_column(column)
    for name, r in results.items():
        for start in ("cold", "warm") if "cold_parts_s" in r else ():
            took = (f"{r[f'{start}_parts_s'][part]:.1f}" for part in PARTS)
            bounds.add_row(name, start, f"{r[f'{start}_start_s']:.1f}", *took)
    Console().print(bounds)
    show_limits(limits(results))
    setting = {key: getattr(arguments, key) for key in ("dtype", "batch", "seq_len", "hidden", "steps", "turns")}
    write_results(arguments.json, setting | {"model": Path(arguments.model).name}, results)


if __name__ == "__main__":
    main()
