"""Whole training steps, side by side in one run: ours, bitsandbytes NF4 + PEFT, and the dense frozen floor.

    python benchmarks/train_step.py [--model DIR | --llama-shape] [--layers N] [--json FILE]

Each contender runs in a process of its own (so peak memory is its own), compiled by Inductor, on the same token ids;
the processes take turns, a few steps each, so a busy minute of the machine hits all of them alike; the first step of
a turn, which finds the caches full of another process's data, is not counted. Reported: median step time, cold compile
time (the first step), peak resident memory above what the imports take, and the ratio to bitsandbytes + PEFT.
The floor is the same model, dense bf16 and frozen, with only the gradient of its embedding output computed: no adapter,
no 4 bits, compiled by Inductor. Every contender computes at least the same matrix products, so below it is only who does
better between them (ours: attention and the loss). On a CPU without bf16 instructions torch's bf16 products are 6 to 10
times slower than fp32 ones: there the fp32 contenders (the same models loaded in fp32: "bitsandbytes_fp32", "floor_fp32")
are what a user would run, and what to compare with.
"ours_no_logits" is ours with `keep_logits=False`: the same loss and gradients, and no logits in the output.
"drop-in" is the model of "bitsandbytes" itself, with our backend in place of Inductor's.

What bounds the ratios is measured in the same run: after the turns each contender takes one more step under torch's
profiler, for the share of it that are matrix products and their rate (operations of the model's dense linears, forward
and dX, and of the adapters; without attention), beside the rate of one large product here, alone; and the floor
says how small any contender's ratio could be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bounds import best_of, product_speed
from common import Worker, cut, llama_shape, load_ours, load_peer, resident_bytes, smollm2, write_results
from limits import Found, entry, show_limits

OURS = ("ours", "ours_no_logits")
PEERS = ("bitsandbytes", "bitsandbytes_bf16_adapters", "bitsandbytes_fp32", "drop-in")
CONTENDERS = ("ours", "ours_no_logits", *PEERS, "floor", "floor_fp32")
LIMITS = {"bitsandbytes": 0.70, "floor": 1.15}  # our step over theirs, SmolLM2, two cores with AVX-512 BF16
LLAMA_LIMITS = {"bitsandbytes": 0.82, "bitsandbytes_bf16_adapters": 0.92, "floor": 1.10}


def build(contender: str, model_dir: str, rank: int) -> tuple[Any, list[Any]]:
    """(compiled model, trainable parameters). bf16 compute, LoRA on all linears but the head, dropout 0."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if contender in OURS:
        model = load_ours(model_dir, rank, keep_logits=contender == "ours")
    elif contender in PEERS:
        dtype = torch.float32 if contender.endswith("fp32") else torch.bfloat16
        adapters = torch.bfloat16 if contender.endswith("bf16_adapters") else None
        model = load_peer(model_dir, rank, dtype=dtype, adapter_dtype=adapters)
    else:
        dtype = torch.float32 if contender.endswith("fp32") else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).requires_grad_(False)
        model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    backend = "qlora" if contender in (*OURS, "drop-in") else "inductor"
    return torch.compile(model, backend=backend), [p for p in model.parameters() if p.requires_grad]


def worker(contender: str, arguments: argparse.Namespace) -> None:
    """Builds the contender, then one step for each line read on standard input; answers one JSON line each."""
    import torch
    import transformers  # noqa: F401  what the imports take is not the contender's memory

    if contender in PEERS:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    if contender in (*OURS, "drop-in"):
        import qlora_compile.backend  # noqa: F401
    start_bytes = resident_bytes()
    model, trainable = build(contender, arguments.model, arguments.rank)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (arguments.batch, arguments.seq_len), generator=generator)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None

    def step() -> dict[str, float]:
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return {"seconds": time.perf_counter() - begin, "loss": loss.item()}

    for line in sys.stdin:
        if line.strip() == "profile":
            answer = product_share(step)
        else:
            answer = step() | {"peak_bytes": resident_bytes("VmHWM") - start_bytes}
        print("STEP " + json.dumps(answer), flush=True)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "_linear_pointwise", "gemv_4bit")


def product_share(step: Callable[[], dict[str, float]]) -> dict[str, float]:
    """One step under the profiler: its seconds, and those within matrix products, the library's and our generated one."""
    import torch

    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        generated_products() as ours,
    ):
        answer = step()
    names = {f"{space}::{name}{end}" for space in ("aten", "mkldnn") for name in PRODUCTS for end in ("", "_")}
    own = [event.self_cpu_time_total for event in profile.key_averages() if event.key in names]
    return answer | {"products_s": sum(own) / 1e6 + sum(ours)}


@contextlib.contextmanager
def generated_products() -> Iterator[list[float]]:
    """The seconds of each call of `wide_gemm`'s C function, decoding and rounding included; none where it does not run."""
    if "qlora_compile.runtime.kernels.cpu_gemm" not in sys.modules:
        yield []
        return
    from qlora_compile.runtime.kernels import cpu_gemm

    find, seconds = cpu_gemm._function, list[float]()

    def timed(*call: object) -> None:
        begin = time.perf_counter()
        find()(*call)
        seconds.append(time.perf_counter() - begin)

    cpu_gemm._function = lambda: timed
    try:
        yield seconds
    finally:
        cpu_gemm._function = find


def operations(arguments: argparse.Namespace, contender: str) -> float:
    """Of a step's products: 2 a weight and token forward, 2 for dX; an adapter's weight has its own gradient too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(arguments.model))
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for _, m in linears)
    adapted = sum(m.in_features + m.out_features for name, m in linears if name != "lm_head")
    adapters = 0 if contender.startswith("floor") else arguments.rank * adapted
    return float(arguments.batch * arguments.seq_len * (4 * weights + 6 * adapters))


class Contender(Worker):
    """A worker process, stepped from here."""

    def __init__(self, name: str, argv: list[str]) -> None:
        super().__init__(name, __file__, argv)
        self.steps, self.times = list[dict[str, float]](), list[float]()

    def turn(self, steps: int) -> None:
        """One step to warm the caches, then `steps` that count."""
        self.step()
        first = len(self.steps)
        for _ in range(steps):
            self.step()
        self.times += [step["seconds"] for step in self.steps[first:]]

    def step(self) -> None:
        self.steps.append(self.ask("step"))

    def result(self) -> dict[str, float]:
        self.close()
        return {
            "step_s": statistics.median(self.times),
            "step_min_s": min(self.times),
            "step_max_s": max(self.times),
            "first_step_s": self.steps[0]["seconds"],
            "peak_mb": self.steps[-1]["peak_bytes"] / 1e6,
            "loss_last": self.steps[-1]["loss"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a bf16 causal LM (default: SmolLM2-135M from its package)")
    parser.add_argument(
        "--llama-shape", action="store_true", help="hidden 2048, 2 layers, random weights, instead of --model"
    )
    parser.add_argument("--layers", type=int, help="keep this many layers of the model only: compiles sooner")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps that count in each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)} (default: ours and those with a limit)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments)
        return
    arguments.model = llama_shape() if arguments.llama_shape else cut(smollm2(arguments.model), arguments.layers)
    names = arguments.contenders.split(",") if arguments.contenders else default_contenders(arguments.llama_shape)
    argv = ["--model", arguments.model, "--batch", str(arguments.batch), "--seq-len", str(arguments.seq_len)]
    argv += ["--rank", str(arguments.rank)]
    contenders = [Contender(name, argv) for name in names]
    for contender in contenders:  # one after the other: the first step compiles
        print(f"{contender.name}: compiling (the first step) ...", flush=True)
        for _ in range(2):
            contender.step()
    for number in range(arguments.turns):
        for contender in contenders:
            contender.turn(arguments.steps)
        print(f"turn {number + 1}/{arguments.turns}", flush=True)
    profiles = {contender.name: contender.ask("profile") for contender in contenders}
    results = {contender.name: contender.result() for contender in contenders}
    report(results, arguments)
    show_limits(limits(results, arguments))
    bounds = bounds_of(results, profiles, arguments)
    setting = {key: getattr(arguments, key) for key in ("batch", "seq_len", "rank", "steps", "turns")}
    setting["model"] = Path(arguments.model).name
    write_results(arguments.json, setting, {name: r | {"bound": bounds[name]} for name, r in results.items()})


def default_contenders(llama: bool) -> list[str]:
    """Ours and what has a limit; the others in fp32 where that is what a user of theirs would run."""
    import torch

    from qlora_compile.runtime.kernels import devices

    if devices.multiplies_natively(torch.bfloat16):
        return ["ours", *(LLAMA_LIMITS if llama else LIMITS)]
    return ["ours", "bitsandbytes_fp32", "floor_fp32"]


def limits(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> Iterator[Found]:
    """Our step's time over that of each contender with a limit: of whole models in the sizes that it was set for."""
    wanted = LLAMA_LIMITS if arguments.llama_shape else LIMITS
    whole = arguments.layers is None and arguments.batch * arguments.seq_len == (1024 if arguments.llama_shape else 512)
    for name, most in wanted.items() if whole and "ours" in results else ():
        other = name if name in results else f"{name}_fp32"
        if other in results:
            yield entry(f"ours / {other}", results["ours"]["step_s"] / results[other]["step_s"], at_most=most)


def bounds_of(
    results: dict[str, dict[str, float]], profiles: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """What bounds each contender's step, printed and returned. The processes have ended: the machine is free to measure."""
    peak = product_speed(best_of(10))
    peer, floor = (results.get(name, results.get(f"{name}_fp32")) for name in ("bitsandbytes", "floor"))
    found = {}
    for name, profile in profiles.items():
        rate = operations(arguments, name) / profile["products_s"] if profile["products_s"] else float("nan")
        found[name] = {
            "products_share": profile["products_s"] / profile["seconds"],
            "products_gflop_s": rate / 1e9,
            "of_peak": rate / peak,
            "operations_at_peak_s": operations(arguments, name) / peak,
        }
        if floor is not None:
            found[name]["of_floor"] = results[name]["step_s"] / floor["step_s"]
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()))
    print(f"one product of 2048 x 2048 alone: {peak / 1e9:.0f} GFLOP/s")
    if floor is not None and peer is not None:
        least = floor["step_s"] / peer["step_s"]
        print(f"the floor is {least:.2f} of bitsandbytes + PEFT: with these products, attention and loss")
    return found


def report(results: dict[str, dict[str, float]], arguments: argparse.Namespace) -> None:
    """The table, with ratios to bitsandbytes + PEFT where it ran."""
    from rich.console import Console
    from rich.table import Table

    peer = results.get("bitsandbytes", results.get("bitsandbytes_fp32"))
    table = Table(title=f"training step, {arguments.batch}x{arguments.seq_len} tokens, r={arguments.rank}, all linears")
    for column in ("", "step s (median)", "min .. max", "first step s", "peak MB", "step / bnb", "memory / bnb"):
        table.add_column(column)
    for name, r in results.items():
        ratios = (f"{r['step_s'] / peer['step_s']:.2f}", f"{r['peak_mb'] / peer['peak_mb']:.2f}") if peer else ("", "")
        spread = f"{r['step_min_s']:.3f} .. {r['step_max_s']:.3f}"
        table.add_row(name, f"{r['step_s']:.3f}", spread, f"{r['first_step_s']:.0f}", f"{r['peak_mb']:.0f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
