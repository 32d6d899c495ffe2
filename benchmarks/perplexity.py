"""Perplexity after the same number of steps on the same data in the same order: ours against bitsandbytes + PEFT.

    python benchmarks/perplexity.py [--model DIR] [--steps 60] [--seeds 2] [--json FILE]

Both quantize the same bf16 weights to NF4 with double quantization, train LoRA r=16 on all linears with AdamW on the
speeches of 1790-1839, and are measured on those of 1845-1849. The adapters start from other random numbers (each
library's own), so several seeds are run and the spread is printed beside the difference.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from common import load_ours, load_peer, smollm2, speeches, write_results
from torch import Tensor
from transformers import AutoTokenizer

SEQ_LEN, BATCH = 256, 2


def blocks(text: str, tokenizer: Any) -> Tensor:
    """text -> [blocks, SEQ_LEN] token ids, the ragged end dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN)


@torch.no_grad()
def perplexity(model: Any, data: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=block, labels=block).loss.item() for block in data.split(BATCH)]
    return math.exp(statistics.fmean(losses))


def train(model: Any, data: Tensor, steps: int, seed: int, backend: str) -> list[float]:
    model.config.use_cache = False
    model.train()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    losses = []
    for step in range(steps):
        ids = data[order[step * BATCH : (step + 1) * BATCH]]
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(contender: str, arguments: argparse.Namespace, seed: int, train_data: Tensor, held_out: Tensor) -> Any:
    torch.manual_seed(seed)
    if contender == "ours":
        model, backend = load_ours(arguments.model, 16), "qlora"
    else:
        model, backend = load_peer(arguments.model, 16), "inductor"
    before = perplexity(model, held_out) if contender == "ours" else None
    losses = train(model, train_data, arguments.steps, seed, backend)
    after = perplexity(model, held_out)
    torch._dynamo.reset()
    print(f"{contender}, seed {seed}: {before or float('nan'):.3f} -> {after:.3f}", flush=True)
    return {"perplexity_before": before, "perplexity": after, "last_losses": losses[-5:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a causal LM (default: SmolLM2-135M from its package)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.model = smollm2(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train_data = blocks(speeches(range(1790, 1840)), tokenizer)
    held_out = blocks(speeches(range(1845, 1850)), tokenizer)[:40]
    results: dict[str, Any] = {}
    for contender in ("ours", "bitsandbytes"):
        runs = [run(contender, arguments, seed, train_data, held_out) for seed in range(arguments.seeds)]
        values = [r["perplexity"] for r in runs]
        results[contender] = {"mean": statistics.fmean(values), "spread": max(values) - min(values), "runs": runs}
    difference = results["ours"]["mean"] / results["bitsandbytes"]["mean"] - 1
    print(
        f"ours {results['ours']['mean']:.3f}, bitsandbytes + PEFT {results['bitsandbytes']['mean']:.3f}: {difference:+.2%}"
    )
    results["difference"] = difference
    write_results(arguments.json, {"steps": arguments.steps, "batch": BATCH, "seq_len": SEQ_LEN, "rank": 16}, results)


if __name__ == "__main__":
    main()
