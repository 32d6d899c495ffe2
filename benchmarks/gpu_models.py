"""Whole training steps and decoding of a Llama of random weights: ours, dense bf16 LoRA and bitsandbytes NF4 + PEFT.

All are compiled by Inductor (ours through the backend "qlora"), with the same tokens and rank on all linears but the head.
PEFT keeps adapters in fp32 and multiplies in fp32 unless they are cast; ours are fp32 too and products run in bf16. So
"bitsandbytes" is what PEFT's users run, and in "bitsandbytes_bf16" the adapters are cast. Used by gpu.py, which gives each
contender a process of its own: peaks and compilations are its alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_kernels import RANK
from gpu_timing import synchronize
from torch import Tensor, nn

import qlora_compile as qc

Shape = dict[str, int]
Step = Callable[[], float]
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {  # bitsandbytes' own CPU path wants whole blocks of 64 in a row
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
WARM_UP = 2  # steps that are not counted


def llama(shape: Shape, layers: int, device: str) -> nn.Module:
    """A bf16 Llama made on the device; weights of variance 1 / hidden size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, num_hidden_layers=layers, use_cache=False, max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def contender(name: str, model: nn.Module, device: str) -> nn.Module:
    """The model as this contender trains it, not yet compiled."""
    if name.startswith("ours"):
        keep_logits = name != "ours_without_logits"
        return qc.prepare(model, qc.QLoRAConfig(r=RANK, lora_alpha=2 * RANK, keep_logits=keep_logits))
    from peft import LoraConfig, get_peft_model

    if name.startswith("bitsandbytes"):
        into_bitsandbytes(model, device)
        model.is_loaded_in_4bit = True  # what PEFT asks for
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for key, parameter in adapted.named_parameters():
        if name.endswith("_bf16") and "lora_" in key:
            parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def into_bitsandbytes(model: nn.Module, device: str) -> None:
    """Every linear but the head becomes bitsandbytes' NF4 one, in place, a layer at a time."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = Linear4bit(
                    child.in_features, child.out_features, False, torch.bfloat16, quant_type="nf4", device="meta"
                )
                new.weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(device))
                del child


def made(name: str, shape: Shape, layers: int, device: str) -> nn.Module:
    """A contender's model from the same seed; what its making took is given back."""
    torch.manual_seed(0)
    model = contender(name, llama(shape, layers, device), device).train()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, backend: str, batches: Sequence[Tensor]) -> Step:
    """A training step of the compiled model over batches of ids, which returns its loss when the device has done it."""
    compiled = torch.compile(model, backend=backend)

    def step() -> float:
        total = torch.zeros((), device=batches[0].device)
        for ids in batches:
            loss = compiled(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()  # waits for the device

    return step


def training_step(name: str, model: nn.Module, shape: Shape, tokens: tuple[int, int], device: str) -> Step:
    """A contender's."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, fused=True)
    ids = torch.randint(0, shape["vocab_size"], tokens, device=device)
    return stepper(model, optimizer, "qlora" if name.startswith("ours") else "inductor", [ids])


def timed_steps(step: Step, device: str, steps: int, turn: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Median of `steps` after WARM_UP that compile, losses and, on CUDA, the memory's peaks. `turn` waits, in between, until
    nothing else runs.

    "first_step_s" is a compilation with the caches as the parts before left them, others beside it. "peak_mb" is training's,
    "peak_with_compiling_mb" that of the process so far (the dense model and the compilation too), "reserved_mb" what
    the allocator has taken of the device meanwhile, and "alloc_retries" how often it had to give all of it back first.
    """
    times, losses, found, retries = [], [], {}, 0
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            turn()
        if number == WARM_UP and device == "cuda":
            found["peak_with_compiling_mb"] = torch.cuda.max_memory_allocated() / 1e6
            retries = alloc_retries()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - begin)
    if device == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        found["reserved_mb"] = torch.cuda.max_memory_reserved() / 1e6
        found["alloc_retries"] = alloc_retries() - retries
    median = statistics.median(times[WARM_UP:])
    said = {"step_s": median, "first_step_s": times[0], "loss_first": losses[0], "loss_last": losses[-1]}
    return said | found


def alloc_retries() -> int:
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


def decoding(model: nn.Module, shape: Shape, device: str, new_tokens: int) -> dict[str, float]:
    """Seconds a token, batch 1, dynamic cache, not compiled: what `model.generate` does without more."""
    model.eval()
    prompt = torch.randint(0, shape["vocab_size"], (1, 16), device=device)

    def generate(count: int) -> Tensor:
        # the cache by name: what a model's configuration said when it was made is what it generates with
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(input_ids=prompt, use_cache=True, do_sample=False, pad_token_id=0, **length)

    with torch.no_grad():
        generate(new_tokens)  # as long: cuDNN plans its attention anew for each length of the cache
        synchronize(device)
        begin = time.perf_counter()
        generate(new_tokens)
        synchronize(device)
    return {"token_s": (time.perf_counter() - begin) / new_tokens}
