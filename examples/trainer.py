"""transformers' Trainer on a 4-bit model with compiled adapters: prepare, compile in place, hand over.

    python examples/trainer.py --model ./SmolLM2-135M --data speeches.txt --out out

Its checkpoints hold the adapter, and `--resume` goes on from the last one. Nothing here but the lines with `qc.` and
`.compile(...)` is other than for any model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import qlora_compile as qc


def blocks(tokenizer: object, text: str, length: int) -> list[dict[str, torch.Tensor]]:
    """The text's tokens, cut into blocks of `length`; labels are the tokens themselves."""
    ids = torch.tensor(tokenizer(text)["input_ids"])  # type: ignore[operator]
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="a text file")
    parser.add_argument("--out", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-steps", type=int, default=10, help="steps from one checkpoint to the next")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--lowering", default="inductor", help="inductor, aot_eager or eager")
    options = parser.parse_args(args)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    qc.prepare(model, qc.QLoRAConfig(r=8, lora_alpha=16, lowering=options.lowering))
    model.compile(backend="qlora")

    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=options.save_steps,
        report_to=[],
    )
    data = blocks(tokenizer, options.data.read_text(encoding="utf-8"), options.length)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=options.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print("adapter:", qc.save_adapter(model, options.out / "adapter"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
