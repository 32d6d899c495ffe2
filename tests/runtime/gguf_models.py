"""Small models and tokenizers of the families that go into GGUF files, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXTS = [
    "the quick brown fox jumps over the lazy dog, 1234 times",
    "while seven wizards mix a jug of bad liquor; isn't it?",
]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save_family(path: Path, family: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """A random model of `family` with a tokenizer of its kind; the size of a head is not hidden_size / heads."""
    import transformers

    qwen = family.startswith("Qwen")
    tokenizer = byte_level_tokenizer(QWEN2_SPLIT) if qwen else sentencepiece_tokenizer()
    settings: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 if qwen else 3,
        "num_key_value_heads": 2 if qwen else 1,
        "vocab_size": len(tokenizer) + 5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": family in ("Llama", "Qwen3"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 3e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings |= {"Qwen2": {}, "Qwen3": {"head_dim": 40}}.get(family, {"head_dim": 18})
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**(settings | overrides))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # norms of ones and biases of zeros would hide a mistake
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sentencepiece_tokenizer() -> Any:
    """BPE with byte fallback and a space before the text, as in Llama 2 and Mistral."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    import json

    model = json.loads(learned.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_level_tokenizer(split: str | None, digits: bool = False) -> Any:
    """Byte-level BPE that cuts text by `split` (None: GPT-2's own way), with two added tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(split), behavior="isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
