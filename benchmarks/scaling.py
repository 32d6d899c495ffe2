"""Tables of docs/scaling.md: what a QLoRA step keeps, sends and takes on N GPUs, from `estimate` and qlora_compile.scaling.

    python benchmarks/scaling.py            # print the tables
    python benchmarks/scaling.py --write    # put them into docs/scaling.md

Nothing here is measured: bytes follow from shapes (tests/distributed checks that runs of 2 and 4 processes keep and send
just these), FLOPs from one trace on fake tensors; times take the vendors' peak rates at the utilization given below.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_compile.config import QLoRAConfig
from qlora_compile.estimate import Estimator, devices
from qlora_compile.memory_plan import MemoryPlan
from qlora_compile.scaling import FP32, Parts

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "use_cache": False, "max_position_embeddings": 131072}
MODELS: dict[str, dict[str, int]] = {  # Llama 3.1
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
RANKS = (1, 8, 64, 1024)
DEVICE, UTILIZATION = "H100-SXM", 0.4
NODE, NVLINK, NETWORK = 8, 450e9, 50e9  # GPUs of a machine; bytes/s a GPU and direction: NVLink 4, 400 Gb/s InfiniBand
HOP_S = 10e-6  # of one message of a ring
ENGINES = ("DDP", "FSDP2", "FSDP2 in 8, DDP across")
TOKENS = 4096  # one sequence a GPU and step
CONFIG = QLoRAConfig(r=16, keep_logits=False)
TRAINING = 3 * FP32  # gradient and AdamW's two moments of an adapter's value


@dataclass
class Model:
    """One model's parts and its plan of one sequence a GPU."""

    name: str
    parts: Parts
    plan: MemoryPlan
    width: int
    layers: int

    @classmethod
    def of(cls, name: str) -> Model:
        options: dict[str, Any] = COMMON | MODELS[name]
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**options)).to(torch.bfloat16)
        plan = Estimator(model, CONFIG).plans.one.at(1, TOKENS)
        parts = Parts.of(model, model.model.layers, CONFIG)
        return cls(name, parts, plan, options["hidden_size"], options["num_hidden_layers"])

    @property
    def activations(self) -> int:
        """Bytes with activation checkpointing: each layer's bf16 input, and all that one layer saves."""
        return self.layers * TOKENS * self.width * 2 + self.plan.saved_bytes() // self.layers

    @property
    def scratch(self) -> int:
        """One weight dequantized, and what a layer holds for a moment."""
        peak = self.plan.peak("backward").by_kind
        return peak.get("workspace", 0) + peak.get("temporary", 0)

    def memory(self, ranks: int, split: bool) -> int:
        adapters = self.parts.adapter_values
        own = self.activations + self.scratch
        if not split:
            bucket = FP32 * adapters if ranks > 1 else 0  # DDP's buckets are a second copy of the gradients
            return own + self.parts.stored_bytes + (FP32 + TRAINING) * adapters + bucket
        trained = TRAINING * sum(group.adapter_part(ranks) for group in self.parts.groups)
        return own + self.parts.kept(ranks) + trained + self.parts.unsharded(ranks)

    def received(self, ranks: int, split: bool) -> float:
        """Bytes that one rank receives in a step."""
        share = (ranks - 1) / ranks
        if not split:
            return 2 * share * FP32 * self.parts.adapter_values
        return share * (self.parts.gathered(ranks) + self.parts.reduced(ranks))

    @property
    def compute_s(self) -> float:
        """FLOPs of the step and of the second forward of checkpointing: half as many, as frozen weights have no gradient."""
        return self.plan.flops() * 3 / 2 / (devices()[DEVICE]["bf16_flops"] * UTILIZATION)

    def exchange_s(self, ranks: int, split: bool) -> float:
        """A ring: all links at work, the slowest one counts; each exchange takes N - 1 hops."""
        if ranks == 1:
            return 0.0
        rate = NVLINK if ranks <= NODE else NETWORK
        exchanges = (3 * self.layers + 2) if split else 2
        return self.received(ranks, split) / rate + exchanges * (ranks - 1) * HOP_S

    def hybrid_exchange_s(self, ranks: int) -> float:
        """FSDP2 within a machine, its shards' gradients summed over the machines."""
        machines = ranks // NODE
        across = 2 * (machines - 1) / machines * FP32 * self.parts.adapter_values / NODE / NETWORK
        return self.exchange_s(NODE, True) + across + self.layers * 2 * (machines - 1) * HOP_S


def gigabytes(amount: float) -> str:
    return f"{amount / 1e9:.1f}" if amount < 1e11 else f"{amount / 1e9:.0f}"


def sizes_table(models: list[Model]) -> str:
    lines = [
        "| model | dense bf16 | 4-bit + dense rest | adapters r=16 | trained state | activations, 1 × 4096 | FLOPs a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        values = model.parts.adapter_values
        weights = sum(out * width for group in model.parts.groups for out, width in group.linears)
        dense = 2 * weights + sum(group.dense_bytes for group in model.parts.groups)
        cells = [dense, model.parts.stored_bytes, FP32 * values, TRAINING * values, model.activations]
        flops = f"{model.plan.flops() / 1e12:,.0f} T"
        lines.append(f"| {model.name} | {' | '.join(gigabytes(cell) for cell in cells)} | {flops} |")
    return "\n".join(lines)


def ranks_table(models: list[Model]) -> str:
    lines = [
        "| model | GPUs | engine | GB a GPU | fits 80 GB | received a step, GB | with a bf16 base, GB | exchange, s | "
        "compute, s | step, s | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    room = devices()[DEVICE]["memory_bytes"]
    for model in models:
        weights = sum(out * width for group in model.parts.groups for out, width in group.linears)
        for ranks in RANKS:
            for engine in ENGINES[: 1 if ranks == 1 else 2 if ranks <= NODE else 3]:
                split, hybrid = engine.startswith("FSDP2"), "across" in engine
                memory = model.memory(NODE if hybrid else ranks, split)
                received = model.received(NODE if hybrid else ranks, split)
                exchange = model.hybrid_exchange_s(ranks) if hybrid else model.exchange_s(ranks, split)
                step = max(model.compute_s, exchange) if split else model.compute_s + exchange
                dense = gigabytes(4 * weights) if split else "the same"  # 2 bytes a value, in forward and in backward
                fits = memory <= room
                cells = [gigabytes(memory), "yes" if fits else "no", gigabytes(received), dense, f"{exchange:.2f}"]
                cells += [f"{model.compute_s:.2f}", f"{step:.2f}" if fits else "-"]
                cells += [f"{ranks * TOKENS / step:,.0f}" if fits else "-"]
                lines.append(f"| {model.name} | {ranks} | {'-' if ranks == 1 else engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(tables: dict[str, str]) -> None:
    """Each table between its marks in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
        assert count == 1, f"{DOCUMENT} has no place for the table {name!r}"
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    args = parser.parse_args()
    models = [Model.of(name) for name in MODELS]
    tables = {"sizes": sizes_table(models), "ranks": ranks_table(models)}
    print("\n\n".join(tables.values()))
    if args.write:
        write(tables)


if __name__ == "__main__":
    main()
