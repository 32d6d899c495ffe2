"""Whole training steps and decoding of a Llama of random weights: ours, dense bf16 LoRA and bitsandbytes, one by one.

Used by gpu.py. All are compiled by Inductor (ours through the backend "qlora"), with the same tokens and rank on all
linears but the head.
"""

from __future__ import annotations

import cProfile
import gc
import importlib.util
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import RANK, synchronize
from torch import Tensor, nn

import qlora_compile as qc

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
CONTENDERS = ("ours", "ours_without_logits", "dense_lora", "bitsandbytes")


def llama(shape: dict[str, int], layers: int, device: str) -> nn.Module:
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

    if name == "bitsandbytes":
        into_bitsandbytes(model, device)
        model.is_loaded_in_4bit = True  # what PEFT asks for
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def into_bitsandbytes(model: nn.Module, device: str) -> None:
    """Every linear but the head becomes bitsandbytes' NF4 one, in place, a layer at a time."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, False, torch.bfloat16, quant_type="nf4", device="meta"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(device))
                del child


def missing(name: str) -> str | None:
    """The package that a contender needs and this machine lacks."""
    wanted = {"dense_lora": ("peft",), "bitsandbytes": ("peft", "bitsandbytes")}.get(name, ())
    return next((package for package in wanted if importlib.util.find_spec(package) is None), None)


def clean(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def training(
    name: str, shape: dict[str, int], layers: int, tokens: tuple[int, int], device: str, steps: int
) -> dict[str, Any]:
    """Median step, cold compile and, on CUDA, peak memory of one contender."""
    clean(device)
    torch.manual_seed(0)
    model = contender(name, llama(shape, layers, device), device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    compiled = torch.compile(model, backend="qlora" if name.startswith("ours") else "inductor")
    ids = torch.randint(0, shape["vocab_size"], tokens, device=device)
    times, losses = [], []

    def step() -> None:
        begin = time.perf_counter()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - begin)

    for _ in range(steps + 2):
        step()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    result = {
        "step_s": statistics.median(times[2:]),
        "first_step_s": times[0],
        "peak_mb": peak / 1e6,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "tokens_per_s": tokens[0] * tokens[1] / statistics.median(times[2:]),
    }
    return result | {"profile": profiled(step, device)}


def profiled(step: Callable[[], object], device: str, most: int = 20) -> dict[str, Any]:
    """Where one step's time goes: on the device by kernel, in Python by function, in ms with the number of calls. The
    second run is slowed down by its profiler, about twofold where calls are short."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as on_device:
        step()
    events = on_device.key_averages()
    spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    kernels = sorted(((e.key[:90], getattr(e, spent) / 1e3, e.count) for e in events), key=lambda row: -row[1])
    profiler = cProfile.Profile()
    profiler.runcall(step)
    functions: list[tuple[str, float, int]] = []
    for (path, _, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        functions.append((f"{'/'.join(Path(path).parts[-2:])}:{name}"[:90], own * 1e3, calls))
    functions.sort(key=lambda row: -row[1])
    return {
        "device_ms": sum(row[1] for row in kernels),
        "kernels": kernels[:most],
        "python_ms": sum(row[1] for row in functions),
        "functions": functions[:most],
    }


def decoding(name: str, shape: dict[str, int], layers: int, device: str, new_tokens: int) -> dict[str, Any]:
    """Seconds a token, batch 1, dynamic cache, not compiled: what `model.generate` does without more."""
    clean(device)
    torch.manual_seed(0)
    model = contender(name, llama(shape, layers, device), device).eval()
    prompt = torch.randint(0, shape["vocab_size"], (1, 16), device=device)

    def generate(count: int) -> Tensor:
        # the cache by name: what a model's configuration said when it was made is what it generates with
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(input_ids=prompt, use_cache=True, do_sample=False, pad_token_id=0, **length)

    with torch.no_grad():
        generate(
            new_tokens
        )  # as long: cuDNN plans its attention anew for each length of the cache, for all contenders once
        synchronize(device)
        begin = time.perf_counter()
        generate(new_tokens)
        synchronize(device)
    return {"token_s": (time.perf_counter() - begin) / new_tokens}
