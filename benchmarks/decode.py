"""Greedy decoding with `model.generate`, nothing compiled: ours, bitsandbytes NF4 + PEFT, dense bf16 + PEFT.

    python benchmarks/decode.py [--tokens 64] [--turns 5] [--contenders ours,bitsandbytes,dense] [--threads 2] [--json FILE]

"bitsandbytes_fp32" and "dense_fp32" are the same models loaded in fp32, which is faster on a CPU without bf16 instructions.

SmolLM2-135M, one sequence, r=16 on all linears but the head, dynamic cache. A token's time is that of `tokens` further
tokens after the first, so that the prompt is not in it. Contenders take turns in one process. The limit of each is the
bytes of weights that a token has to read (codes, scales, adapters, the head's bf16 matrix), at the speed of a read that
is measured in the same run; "call" is one linear of 576 x 576 called by itself, where Python is most of the time;
"processor" is the time that all threads worked, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bounds import Speeds, best_of
from common import load_ours, load_peer, smollm2, write_results

RANK = 16


def load(name: str, model_dir: str) -> Any:
    """The contender's model, ready to generate."""
    torch.manual_seed(0)
    if name == "ours":
        return load_ours(model_dir, RANK).eval()
    dtype = torch.float32 if name.endswith("_fp32") else torch.bfloat16
    if name.startswith("bitsandbytes"):
        return load_peer(model_dir, RANK, dtype=dtype).eval()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype), lora).eval()


def weight_bytes(model: torch.nn.Module) -> int:
    """What a token reads: every parameter once (the embedding is the head's matrix too), 4-bit ones as they are stored."""
    total = 0
    for parameter in model.parameters():
        stored = getattr(parameter, "stored_bytes", None)
        if stored is None:
            stored = parameter.numel() * parameter.element_size() + scale_bytes(parameter)
        total += stored
    return total


def scale_bytes(parameter: Any) -> int:
    """Of bitsandbytes' scales, which it keeps beside a parameter of codes."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    nested = [state.state2.absmax] if getattr(state, "state2", None) is not None else []
    return sum(t.numel() * t.element_size() for t in (state.absmax, *nested))


def median_s(call: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls in a row, the median of 9 rounds."""
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - begin) / count)
    return statistics.median(times[1:])


def linear_call_us(model: Any) -> float:
    """One call of the first query projection with one row."""
    module = next(module for name, module in model.named_modules() if name.endswith("self_attn.q_proj"))
    x = torch.randn(1, 1, 576, dtype=model.dtype)
    return 1e6 * median_s(lambda: module(x), 100)


def further_tokens_s(model: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds a token, of those after the first; and seconds of processor time, of all threads."""
    spent = []
    for count in (1, tokens + 1):
        begin = time.perf_counter(), time.process_time()
        model.generate(input_ids=prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        spent.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return (spent[1][0] - spent[0][0]) / tokens, (spent[1][1] - spent[0][1]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a bf16 causal LM (default: SmolLM2-135M from its package)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--contenders", default="ours,bitsandbytes,dense")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model_dir = smollm2(arguments.model)
    models = {name: load(name, model_dir) for name in arguments.contenders.split(",")}
    prompt = torch.randint(0, 1000, (1, 16), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(arguments.turns + 1):
            for name, model in models.items():
                spent = further_tokens_s(model, prompt, arguments.tokens)
                if turn:  # the first one warms up
                    times[name].append(spent)
        calls = {name: linear_call_us(model) for name, model in models.items()}
    results = report(models, times, calls)
    setting = {key: getattr(arguments, key) for key in ("tokens", "turns")} | {
        "model": Path(model_dir).name,
        "rank": RANK,
    }
    write_results(arguments.json, setting, results)


def report(
    models: dict[str, torch.nn.Module], times: dict[str, list[tuple[float, float]]], calls: dict[str, float]
) -> dict[str, dict[str, float]]:
    """The table as it is printed and stored."""
    speed, found = Speeds.measure(best_of(10)).read, {}
    for name, spent in times.items():
        values = [wall for wall, _ in spent]
        median, bytes_read = statistics.median(values), weight_bytes(models[name])
        row = {
            "token_ms": 1e3 * median,
            "token_min_ms": 1e3 * min(values),
            "token_max_ms": 1e3 * max(values),
            "processor_ms": 1e3 * statistics.median(processor for _, processor in spent),
            "call_us": calls[name],
            "weights_mb": bytes_read / 1e6,
            "limit_ms": 1e3 * bytes_read / speed,
            "read_gb_s": speed / 1e9,
        }
        row["limit_share"] = row["limit_ms"] / row["token_ms"]
        found[name] = row
    for name, row in found.items():
        if "bitsandbytes" in found:
            row |= {
                f"{key}_of_bitsandbytes": row[key] / found["bitsandbytes"][key] for key in ("token_ms", "processor_ms")
            }
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    return found


if __name__ == "__main__":
    main()
