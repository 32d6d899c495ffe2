"""TRL's SFTTrainer on a 4-bit model with compiled adapters (`pip install -e '.[trl]'` in the clone).

    python examples/sft_trainer.py --model ./SmolLM2-135M-Instruct --data chats.jsonl --out out

Each line of the data is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import qlora_compile as qc


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, with a chat template")
    parser.add_argument("--data", required=True, type=Path, help=".jsonl of chats")
    parser.add_argument("--out", required=True, type=Path, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lowering", default="inductor", help="inductor, aot_eager or eager")
    options = parser.parse_args(args)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    qc.prepare(model, qc.QLoRAConfig(r=8, lora_alpha=16, lowering=options.lowering))
    model.compile(backend="qlora")

    arguments = SFTConfig(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        max_length=256,
        gradient_checkpointing=False,
        bf16=False,  # products run in bfloat16 anyway; autocast would only refuse machines without a GPU
        report_to=[],
    )
    chats = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(chats), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print("adapter:", qc.save_adapter(model, options.out / "adapter"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
