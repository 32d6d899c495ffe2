"""GGUF files of Llama, Mistral, Qwen2 and Qwen3: a config, a tokenizer and tensors -> one file, tensor by tensor.

Names are llama.cpp's (`gguf.TensorNameMap`). Matrices take the file's type, vectors and what is not whole blocks of 32
for Q8_0 stay F32 and F16, as llama.cpp's converter does. Llama's rotary embedding pairs neighbours (2i, 2i + 1) there
and halves (i, i + d/2) in transformers, so rows of q and k are reordered. Source: llama.cpp `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ...errors import CheckpointError, ConfigError, MissingDependencyError
from .checkpoint_dir import TensorSpec
from .gguf_rope import FACTORS, add_rope, rope_factors
from .gguf_tokenizer import read_tokenizer

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
TYPES = ("F32", "F16", "BF16", "Q8_0")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Q8_BLOCK = 32


def gguf_module() -> Any:
    """The package `gguf`. Raises MissingDependencyError."""
    try:
        import gguf
    except ImportError:
        raise MissingDependencyError("gguf", "gguf", "Writing format='gguf'") from None
    return gguf


def architecture_of(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a config's architecture. Raises ConfigError for one that is not written here."""
    named = [str(name) for name in config.get("architectures") or ["(none)"]]
    if named[0] not in ARCHITECTURES:
        raise ConfigError(f"format='gguf' writes {', '.join(ARCHITECTURES)}; this model is {named[0]}.")
    return ARCHITECTURES[named[0]]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: `key` of the checkpoint, name and type there; `heads` > 0: rows reordered within heads."""

    key: str
    name: str
    kind: str
    shape: tuple[int, ...]
    heads: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """What its values are computed in before they are stored (Q8_0: fp32)."""
        return DTYPES.get(self.kind, torch.float32)

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        return count // Q8_BLOCK * (Q8_BLOCK + 2) if self.kind == "Q8_0" else count * self.dtype.itemsize

    def encode(self, values: torch.Tensor) -> Any:
        """`values` (of `dtype`, in the checkpoint's order) -> the array to store: bytes for BF16 and Q8_0."""
        if self.heads:
            # [heads, 2, d/2, ...] -> [heads, d/2, 2, ...]
            halves = values.reshape(self.heads, 2, -1, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        values = values.contiguous()
        if self.kind == "BF16":
            return values.view(torch.uint8).numpy()
        if self.kind == "Q8_0":
            gguf = gguf_module()
            return gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
        return values.numpy()

    def decode(self, stored: Any) -> torch.Tensor:
        """What a reader of the stored array computes with, in the checkpoint's order."""
        gguf = gguf_module()
        values = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[self.kind]).copy())
        values = values.reshape(self.shape)
        if not self.heads:
            return values
        pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
        return pairs.transpose(1, 2).reshape(self.shape)


def plan_tensors(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], kind: str) -> list[GgufTensor]:
    """Each tensor of a checkpoint with its name in the file, in the model's order.

    Raises CheckpointError for a tensor that the architecture has no name for.
    """
    gguf = gguf_module()
    arch = architecture_of(config)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], int(config["num_hidden_layers"]))
    planned = []
    for key, spec in specs.items():
        if key.endswith("rotary_emb.inv_freq"):  # older checkpoints store it; it follows from the config
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"llama.cpp's {arch} has no tensor for {key!r}: it cannot go into a GGUF file.")
        planned.append(GgufTensor(key, name, _kind_of(spec, kind), spec.shape, _heads(arch, key, config)))
    return sorted(planned, key=lambda tensor: _model_order(tensor.name))


def write_gguf(
    file: Path,
    folder: Path,
    config: Mapping[str, Any],
    tensors: list[GgufTensor],
    kind: str,
    produce: Callable[[GgufTensor], Any],
    start: tuple[int, int] = (0, 0),
    written: Callable[[int, IO[bytes]], None] | None = None,
) -> None:
    """Write `file` of the whole `config`; `folder` holds the tokenizer's files. `produce(tensor)` gives each stored array.

    One tensor is in memory at a time. Same input, same bytes. `start` = (count, end): so many tensors stand in `file`
    already, up to the byte `end`. `written(count, stream)` is called after each tensor. Raises CheckpointError (a
    tokenizer or a rotary scaling that GGUF has no name for), OSError.
    """
    count, end = start
    if not count:
        _write_header(file, folder, config, tensors, kind)
        end = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(end)
        stream.seek(end)
        _pad(stream)
        for number, tensor in enumerate(tensors[count:], count + 1):
            _write_array(stream, produce(tensor))
            if written is not None:
                written(number, stream)
        factors = rope_factors(config)
        if factors is not None:
            _write_array(stream, factors)


def _write_array(stream: IO[bytes], stored: Any) -> None:
    stream.write(stored.reshape(-1).view("uint8").data)
    _pad(stream)


def _pad(stream: IO[bytes]) -> None:
    stream.write(bytes(-stream.tell() % gguf_module().GGUF_DEFAULT_ALIGNMENT))


def _write_header(file: Path, folder: Path, config: Mapping[str, Any], tensors: list[GgufTensor], kind: str) -> None:
    gguf = gguf_module()
    vocab_size = next((t.shape[0] for t in tensors if t.name == "token_embd.weight"), 0)
    writer = gguf.GGUFWriter(file, architecture_of(config))
    try:
        writer.add_type("model")
        writer.add_name(str(config["architectures"][0]).removesuffix("ForCausalLM"))
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, config, vocab_size)
        add_rope(writer, gguf, config)
        _add_tokenizer(writer, gguf, folder, vocab_size)
        for tensor in tensors:
            ggml_type = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=ggml_type)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(FACTORS, factors.shape, None, factors.nbytes, gguf.GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _kind_of(spec: TensorSpec, kind: str) -> str:
    if len(spec.shape) < 2:
        return "F32"
    return "F16" if kind == "Q8_0" and spec.shape[-1] % Q8_BLOCK else kind


def _heads(arch: str, key: str, config: Mapping[str, Any]) -> int:
    if arch != "llama":
        return 0
    heads = int(config["num_attention_heads"])
    if re.search(r"\.q_proj\.(weight|bias)$", key):
        return heads
    return int(config.get("num_key_value_heads") or heads) if re.search(r"\.k_proj\.(weight|bias)$", key) else 0


def _model_order(name: str) -> tuple[int, int, str]:
    """Embedding, then blocks by number, then the final norm and the head."""
    block = re.match(r"blk\.(\d+)\.", name)
    if block:
        return (1, int(block[1]), name)
    return (0 if name.startswith("token_embd") else 2, 0, name)


def _add_sizes(writer: Any, config: Mapping[str, Any], vocab_size: int) -> None:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    context, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    # llama.cpp attends to everything in these families: up to the window, that is the same.
    if window and config.get("use_sliding_window", "MistralForCausalLM" in config["architectures"]):
        context = min(context, int(window))
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(vocab_size)


def _add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> None:
    tokenizer = read_tokenizer(folder, vocab_size)
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.add_space_prefix is not None:
        writer.add_add_space_prefix(tokenizer.add_space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=tokenizer.model == "gpt2", n_vocab=vocab_size)
    special.add_special_token.setdefault("bos", False)  # readers add one where the file does not say
    special.add_to_gguf(writer, quiet=True)
