"""Training steps of a mixture of experts: ours against the same model with dense bf16 experts, in one run.

    python benchmarks/moe.py [--tokens 512] [--steps 7] [--json FILE]

A Qwen3-MoE of 2 layers, hidden 1024, 32 experts of 384 (8 a token), random bf16 weights. Contenders, each in a process of
its own: "ours" (all of it in 4 bits, adapters on every linear and expert, compiled), "peft" (what bitsandbytes leaves:
dense bf16 experts; PEFT's adapters on the same weights by `target_parameters`; bitsandbytes' linears, eager, since PEFT
documents graph breaks there), "floor" (dense bf16, frozen, no adapters, compiled, gradient of the embeddings only).
Reported: median step time, bytes of the frozen weights, resident memory after the steps and its peak, both above what
the imports take; each also as a share of "peft"'s. On a CPU without bf16 instructions "peft" and "floor" are loaded in
fp32, which is what a user of theirs would do there; ours stays the bf16 model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import resident_bytes, write_results

CONTENDERS = ("ours", "peft", "floor")
RANK = 8
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
}


def write_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)


def build(contender: str, folder: str) -> Any:
    """The model, ready to be called; every linear but the head and every expert has an adapter."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_compile.runtime.kernels import devices

    # the peer's and the floor's
    dtype = torch.bfloat16 if devices.multiplies_natively(torch.bfloat16) else torch.float32
    if contender == "ours":
        import qlora_compile as qc

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=qc.QLoRAQuantizationConfig()
        )
        return torch.compile(qc.prepare(model, qc.QLoRAConfig(r=RANK)), backend="qlora")
    if contender == "peft":
        from peft import LoraConfig, get_peft_model

        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=four)
        linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears, target_parameters=experts)
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    model.enable_input_require_grads()
    return torch.compile(model, backend="inductor")


def frozen_bytes(model: Any) -> int:
    """Of the frozen parameters as they are stored (bitsandbytes' scales, in objects beside them, not counted)."""
    return sum(getattr(p, "stored_bytes", p.nbytes) for p in model.parameters() if not p.requires_grad)


def worker(contender: str, folder: str, tokens: int, steps: int) -> None:
    """Prints one JSON line: seconds of each step after the first two, memory in MB."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401  what the imports take is not the contender's memory

    before = resident_bytes()
    model = build(contender, folder).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    generator = torch.Generator().manual_seed(1)
    seconds = []
    for _ in range(steps + 2):
        ids = torch.randint(0, SHAPE["vocab_size"], (2, tokens // 2), generator=generator)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    mb = 2**20
    result = {
        "first_step_s": seconds[0],
        "step_s": statistics.median(seconds[2:]),
        "fastest_s": min(seconds[2:]),
        "slowest_s": max(seconds[2:]),
        "frozen_mb": frozen_bytes(model) / mb,
        "resident_mb": (resident_bytes() - before) / mb,
        "peak_mb": (resident_bytes("VmHWM") - before) / mb,
        "loss": float(loss),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.folder, arguments.tokens, arguments.steps)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--worker", contender, "--folder", folder]
            command += ["--tokens", str(arguments.tokens), "--steps", str(arguments.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
            results[contender] = json.loads(done.stdout.strip().splitlines()[-1])
    peer = results["peft"]
    for name, found in results.items():
        print(
            f"{name:6} step {found['step_s']:.3f} s ({found['step_s'] / peer['step_s']:.2f} of peft), "
            f"frozen weights {found['frozen_mb']:.0f} MB ({found['frozen_mb'] / peer['frozen_mb']:.2f}), "
            f"memory {found['resident_mb']:.0f} MB ({found['resident_mb'] / peer['resident_mb']:.2f}), "
            f"peak {found['peak_mb']:.0f} MB ({found['peak_mb'] / peer['peak_mb']:.2f}), "
            f"first step {found['first_step_s']:.1f} s, loss {found['loss']:.3f}"
        )
    write_results(arguments.json, {"shape": SHAPE, "tokens": arguments.tokens, "rank": RANK}, results)


if __name__ == "__main__":
    main()
