"""A training loop of one's own on several processes: accelerate starts and feeds them, DDP or FSDP2 joins them.

    accelerate launch --multi_gpu --num_processes 2 examples/finetune_distributed.py --model DIR --data FILE --out DIR
    torchrun --nproc-per-node 2 examples/finetune_distributed.py --model DIR --data FILE --out DIR --fsdp

(On CPUs `--multi_gpu` too, with --cpu after the script's name: accelerate's own --cpu starts one process.)
Each process prepares the same 4-bit model and trains on its part of the text. The adapter is written by the first one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_compile as qc


def blocks_of(file: Path, tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The file's tokens in blocks of `length`; what is left over is dropped."""
    tokens = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
    return list(tokens.split(length)[: len(tokens) // length])


def make_model(args: argparse.Namespace, accelerator: Accelerator) -> tuple[Any, Any]:
    """-> (the model, what to call in training): 4-bit, with adapters, and the same on every process."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model.config.use_cache = False
    qc.prepare(model, qc.QLoRAConfig(r=args.r, lora_alpha=2 * args.r, lowering=args.lowering))
    model.to(accelerator.device)
    if not args.fsdp:
        model.compile(backend="qlora")
        return model, accelerator.prepare_model(model)
    for layer in model.model.layers:
        layer.compile(backend="qlora")
        fully_shard(layer)
    return model, fully_shard(model)


def train(args: argparse.Namespace) -> list[float]:
    """Mean losses over all processes by step."""
    accelerator = Accelerator(cpu=args.cpu)
    if accelerator.num_processes == 1 and args.fsdp:
        raise SystemExit("--fsdp splits the model over processes: start it with torchrun or accelerate launch.")
    data = blocks_of(args.data, AutoTokenizer.from_pretrained(args.model), args.seq_len)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=args.batch, drop_last=True))
    model, call = make_model(args, accelerator)
    optimizer = qc.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    model.train()
    accelerator.print(f"{accelerator.num_processes} processes, {len(loader)} batches of {args.batch} on each")
    losses: list[float] = []
    while len(losses) < args.steps:
        for ids in loader:
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
            accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
            if len(losses) == args.steps:
                break
    if args.fsdp or accelerator.is_main_process:  # of a model that FSDP2 split, every process gives its rows
        qc.save_adapter(model, args.out)
    accelerator.wait_for_everyone()
    accelerator.print(f"adapter saved to {args.out}")
    # DDP first: freed after its process group, it may wait for gloo's threads for ever (torch 2.13)
    (call,) = accelerator.free_memory(call)
    accelerator.end_training()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="text file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--fsdp", action="store_true", help="split the weights too (FSDP2), not the data alone (DDP)")
    parser.add_argument("--cpu", action="store_true", help="train on CPUs even where there are GPUs")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=1, help="sequences a process and step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lowering", default="inductor", choices=("inductor", "aot_eager"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
