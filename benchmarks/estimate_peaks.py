"""What `estimate` says of a step's memory beside what the CPU's allocator counts, for models of different architecture.

    python benchmarks/estimate_peaks.py [--models llama,opt] [--json FILE]

Random weights, 4x192 tokens, r=8 on all linears, compiled by Inductor: layers flat and as one region (the default), with
all logits and without. The estimate comes from one trace on the meta device with symbols for batch and length; the
measurement is the widest moment of a compiled step (forward and backward) by the allocator's own events, on top of what
the model and its adapters hold. There is no peer here: none says before a run what it will take.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from common import write_results

BATCH, SEQ = 4, 192
COMMON: dict[str, Any] = {"vocab_size": 40000, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
WIDTH, MLP, HEADS = 192, 512, 6
LLAMA = COMMON | {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA | {"num_hidden_layers": 6}),
    "qwen2": ("Qwen2Config", LLAMA | {"num_hidden_layers": 6}),
    "qwen3": ("Qwen3Config", LLAMA | {"num_hidden_layers": 6, "head_dim": 32}),
    "mistral": ("MistralConfig", LLAMA | {"num_hidden_layers": 6}),
    "phi3": ("Phi3Config", LLAMA | {"num_hidden_layers": 6}),
    "gpt_neox": (
        "GPTNeoXConfig",
        COMMON
        | {
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
        },
    ),
    "opt": (
        "OPTConfig",
        COMMON
        | {
            "hidden_size": WIDTH,
            "ffn_dim": 4 * WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 6,
            "dropout": 0.0,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
    ),
    "gemma2": ("Gemma2Config", LLAMA | {"num_hidden_layers": 8, "head_dim": 32}),
    "gpt2": (
        "GPT2Config",
        COMMON
        | {"n_embd": WIDTH, "n_head": HEADS, "n_layer": 6, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
}


def compare(name: str, outlined: bool, keep_logits: bool) -> dict[str, Any]:
    """Planned and measured bytes of one model."""
    import torch
    import transformers

    import qlora_compile as qc
    from qlora_compile.estimate import Estimator
    from qlora_compile.resident import measured_peak

    class_name, options = MODELS[name]
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()
    settings = getattr(transformers, class_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).train()
    config = qc.QLoRAConfig(r=8, keep_logits=keep_logits, outline_layers=outlined)
    planned = Estimator(model, config).plans.one.at(BATCH, SEQ).peak()
    qc.prepare(model, config)
    compiled = torch.compile(model, backend="qlora")
    tokens = torch.randint(3, 40000, (BATCH, SEQ))
    batch = {"input_ids": tokens, "labels": tokens}
    compiled(**batch).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    measured = measured_peak(compiled, batch)
    return {"planned_bytes": planned.bytes, "measured_bytes": measured, "off": planned.bytes / measured - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"--models: no model {unknown[0]!r} here, only {', '.join(MODELS)}")
    results: dict[str, Any] = {}
    print(f"{'':10} {'layers':8} {'logits':7} {'estimate':>10} {'measured':>10} {'off':>7}")
    for name in names:
        for outlined in (False, True):
            for keep_logits in (True, False):
                found = compare(name, outlined, keep_logits)
                layers, logits = "region" if outlined else "flat", "all" if keep_logits else "chunks"
                results[f"{name}, {layers}, {logits}"] = found
                mega = [found[key] / 1e6 for key in ("planned_bytes", "measured_bytes")]
                print(
                    f"{name:10} {layers:8} {logits:7} {mega[0]:7.1f} MB {mega[1]:7.1f} MB {found['off']:+7.1%}",
                    flush=True,
                )
    write_results(args.json, {"batch": BATCH, "seq_len": SEQ, "r": 8, "models": {n: MODELS[n] for n in names}}, results)


if __name__ == "__main__":
    main()
