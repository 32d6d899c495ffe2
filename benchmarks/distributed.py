"""Bytes that a rank keeps and that all ranks send in a training step under FSDP2: ours, the formula, and a bf16 base.

    python benchmarks/distributed.py [--results FILE]

Starts itself under torchrun with 2 and 4 processes (gloo). The model has SmolLM2-135M's shapes and random weights; the peer
is PEFT's LoRA on the same model in bf16, split by the same `fully_shard`. Counted are the tensors handed to the
collectives and those that a rank holds; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import write_results
from limits import entry, show_limits
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_compile as qc
from qlora_compile.config import QLoRAConfig
from qlora_compile.scaling import Parts

SIZES = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SIZES |= {"num_attention_heads": 9, "num_key_value_heads": 3}
R, TOKENS = 16, 64
WORLDS = (2, 4)


def plain() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False, tie_word_embeddings=True)).to(torch.bfloat16)


def with_peft() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(plain(), LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear"))


def ours() -> Any:
    return qc.prepare(plain(), QLoRAConfig(r=R, lora_alpha=2 * R))


def size(tensor: Any) -> int:
    return tensor.stored_bytes if hasattr(tensor, "stored_bytes") else tensor.numel() * tensor.element_size()


def measure(model: Any) -> dict[str, int]:
    """One step of a model split layer by layer: bytes kept by this rank, gathered and reduced over all."""
    layers = model.model.layers if hasattr(model.model, "layers") else model.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    found = {"kept": sum(size(parameter.to_local()) for parameter in model.parameters()), "gathered": 0, "reduced": 0}
    gather, reduce = dist.all_gather_single, dist.reduce_scatter_single

    def gathering(output: Any, given: Any, **options: Any) -> Any:
        found["gathered"] += size(output)
        return gather(output, given, **options)

    def reducing(output: Any, input: Any, **options: Any) -> Any:
        found["reduced"] += size(input)
        return reduce(output, input, **options)

    dist.all_gather_single, dist.reduce_scatter_single = gathering, reducing
    ids = torch.arange(TOKENS)[None] % SIZES["vocab_size"]
    model(input_ids=ids, labels=ids).loss.backward()
    dist.all_gather_single, dist.reduce_scatter_single = gather, reduce
    return found


def worker(out: Path) -> None:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"ours": measure(ours()), "bf16 base": measure(with_peft())}
    model = plain()
    parts = Parts.of(model, model.model.layers, QLoRAConfig(r=R))
    ranks = dist.get_world_size()
    found["formula"] = {name: getattr(parts, name)(ranks) for name in ("kept", "gathered", "reduced")}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    results = {}
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "--"]
            command += [__file__, "--worker", str(out)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            results[f"{world} ranks"] = found = json.loads(out.read_text())
        print(f"{world} ranks, MB         kept by a rank   gathered    reduced")
        for name, row in found.items():
            print(f"  {name:18}" + "".join(f"{row[key] / 1e6:13.2f}" for key in ("kept", "gathered", "reduced")))
        ratio = found["ours"]["gathered"] / found["bf16 base"]["gathered"]
        show_limits([entry("ours / bf16 base, gathered", ratio, at_most=0.5)])
    write_results(args.results, {"model": SIZES, "r": R, "dtype": "bfloat16", "collectives": "gloo"}, results)


if __name__ == "__main__":
    main()
