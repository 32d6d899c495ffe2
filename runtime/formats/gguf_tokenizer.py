"""A folder's `tokenizer.json` -> the `tokenizer.ggml.*` keys of a GGUF file.

llama.cpp rebuilds the tokenizer from a vocabulary, merges or scores, and the *name* of a pre-tokenizer ("qwen2",
"llama-bpe", ...): what has no such name is refused, since a file with a wrong one computes with wrong tokens and says
nothing. Sources: llama.cpp `convert_hf_to_gguf.py` (`get_vocab_base_pre`, `LlamaHfVocab`) and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .checkpoint_dir import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expression that cuts text into words -> llama.cpp's name for it.
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{_REST}": "qwen2",
    rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    _TEKKEN: "tekken",
}
_NAME = "The model's tokenizer.json"  # of which a temporary copy is read
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class GgufTokenizer:
    """What goes into the file: `model` "gpt2" (byte-level BPE, by merges) or "llama" (sentencepiece, by scores)."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    add_space_prefix: bool | None


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """`tokenizer.json` of `folder`, a temporary copy of the model's, padded to the embedding's `vocab_size` rows.

    Raises CheckpointError: no such file, more tokens than rows, or a kind of tokenizer that GGUF has no name for.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError("A GGUF file holds its tokenizer, but the model's folder has no tokenizer.json.")
    content = read_json(file, _NAME)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{_NAME} is a {kind or 'broken'} tokenizer; only BPE vocabularies go into GGUF here.")
    _check_shape(content, model)
    tokens, types = _tokens(content, model, vocab_size)
    steps = list(_steps(content.get("pre_tokenizer")))
    if any(step.get("type") == "ByteLevel" for step in steps):
        return GgufTokenizer("gpt2", _split_name(steps), tokens, types, None, None)
    if not model.get("byte_fallback") or _BYTE_TOKENS - set(tokens):
        raise CheckpointError(f"{_NAME} is neither byte-level BPE nor BPE with byte fallback: GGUF has no name for it.")
    scores = _scores(tokens, model.get("merges") or [])
    return GgufTokenizer("llama", "default", tokens, types, scores, _adds_space(content, steps))


def _check_shape(content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """What is read below has the types that `tokenizers` writes. Raises CheckpointError naming what has not."""

    def is_id(value: object) -> bool:
        return type(value) is int and value >= 0

    def is_merge(value: object) -> bool:
        if isinstance(value, str):
            return " " in value
        return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)

    added, merges = content.get("added_tokens") or [], model.get("merges") or []
    good = {
        "model.vocab": all(map(is_id, model["vocab"].values())),
        "model.merges": isinstance(merges, list) and all(map(is_merge, merges)),
        "added_tokens": isinstance(added, list)
        and all(isinstance(e, dict) and is_id(e.get("id")) and isinstance(e.get("content"), str) for e in added),
        "pre_tokenizer": _is_step(content.get("pre_tokenizer")),
        "normalizer": _is_step(content.get("normalizer")),
    }
    for name, is_good in good.items():
        if not is_good:
            raise CheckpointError(f"{_NAME} is corrupt: its {name} is not what a tokenizer has there.")


def _is_step(part: Any) -> bool:
    """Nothing, or an object with a type whose inner steps are such objects."""
    if part is None:
        return True
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    inner = part.get("pretokenizers", part.get("normalizers", []))
    pattern = part.get("pattern", {})
    return isinstance(inner, list) and all(map(_is_step, inner)) and isinstance(pattern, dict | str)


def _tokens(content: Mapping[str, Any], model: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids that no token has are `[PAD7]`, unused, as llama.cpp's converter names them."""
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = {entry["id"]: entry for entry in content.get("added_tokens") or []}
    named = {
        **{number: token for token, number in model["vocab"].items()},
        **{n: e["content"] for n, e in added.items()},
    }
    if max(named, default=-1) >= size:
        raise CheckpointError(
            f"{_NAME} has the token {named[max(named)]!r} of id {max(named)}, but the embedding has {size} rows only; "
            "where the base is a .gguf file, transformers' reader added it: export from the folder it was made from."
        )
    for number, token in named.items():
        tokens[number] = token
        if number in added:
            types[number] = CONTROL if added[number].get("special") else USER_DEFINED
        elif token in _BYTE_TOKENS:
            types[number] = BYTE
        else:
            types[number] = NORMAL
        if token == model.get("unk_token") and types[number] != USER_DEFINED:
            types[number] = UNKNOWN
    return tokens, types


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer or normalizer -> its steps, sequences taken apart."""
    if not isinstance(part, dict):
        return
    inner = part.get("pretokenizers") or part.get("normalizers")
    if inner is None:
        yield part
        return
    for step in inner:
        yield from _steps(step)


def _split_name(steps: list[Mapping[str, Any]]) -> str:
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    given = steps[0].get("pattern") if kinds == ["Split", "ByteLevel"] else None
    pattern = given.get("Regex") if isinstance(given, dict) else None
    if isinstance(pattern, str) and pattern in _SPLITS and not steps[1].get("use_regex", True):
        return _SPLITS[pattern]
    raise CheckpointError(
        f"{_NAME} cuts text by {'+'.join(map(str, kinds))} in a way that llama.cpp has no name for; known: "
        f"gpt-2, smollm, {', '.join(_SPLITS.values())}."
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Sentencepiece's score of each token: 0, -1, -2, ... in the order in which merges make them; the rest after them.

    sentencepiece merges the pair whose result scores highest, `tokenizers` the pair that stands first: the same order.
    """
    rank: dict[str, int] = {}
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _adds_space(content: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> bool:
    """Whether a space is put before the text (`Metaspace`, or older files' `Prepend`)."""
    if any(step.get("type") == "Prepend" for step in _steps(content.get("normalizer"))):
        return True
    metaspace = next((step for step in steps if step.get("type") == "Metaspace"), {})
    return metaspace.get("prepend_scheme", "never") != "never" or bool(metaspace.get("add_prefix_space"))
