"""What transformers' GGUF reader passes by: settings that only the tensors tell, and tensors that it has no place for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .formats.gguf_rope import FACTORS, read_rope

# Biases that a configuration of transformers switches on, by what llama.cpp calls them.
_BIASES = {
    "attention_bias": re.compile(r"\.attn_(q|k|v|output)\.bias$"),
    "mlp_bias": re.compile(r"\.ffn_(gate|up|down)\.bias$"),
}


class GGUFFile:
    """One file, opened once: its header alone takes seconds where it holds a large vocabulary."""

    def __init__(self, file: Path) -> None:
        import gguf

        self.file, self._reader = file, gguf.GGUFReader(file)

    def config(self) -> Any:
        """The model's configuration, as the tensors have it.

        transformers 5.23 takes Llama and Qwen3 to have no biases, every head of Qwen3 to be of size 128, and no model to
        scale its rotary embedding.
        """
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(str(self.file.parent), local_files_only=True, gguf_file=self.file.name)
        for option, pattern in _BIASES.items():
            if hasattr(config, option) and any(pattern.search(tensor.name) for tensor in self._reader.tensors):
                setattr(config, option, True)
        if config.model_type == "qwen3":
            field = self._reader.fields.get("qwen3.attention.key_length")
            config.head_dim = config.head_dim if field is None else int(field.contents())
        if getattr(config, "rope_parameters", None):
            config.rope_parameters = read_rope(self._reader, config.rope_parameters)
        return config

    def check_all_taken(self, model: torch.nn.Module) -> None:
        """Raise CheckpointError where the file holds values that `model`, read from it, does not: they are dropped unsaid.

        Names tell which (`gguf.TensorNameMap`), but not whether: experts and others are stored under names of their own.
        Blocks after the last layer are llama.cpp's for predicting several tokens, which no model of transformers has.
        """
        import gguf

        config: Any = model.config
        layers = int(config.num_hidden_layers)
        stored = {
            tensor.name: int(tensor.n_elements) for tensor in self._reader.tensors if _block(tensor.name) < layers
        }
        stored.pop(FACTORS, None)  # in the configuration
        state = model.state_dict(keep_vars=True)
        if sum(stored.values()) <= sum({id(tensor): tensor.numel() for tensor in state.values()}.values()):
            return
        architecture = str(self._reader.fields["general.architecture"].contents())
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(numbers[architecture], layers)
        taken = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in state}
        left = sorted(set(stored) - taken)
        if left:
            raise CheckpointError(
                f"{self.file} holds {len(left)} tensors that transformers' {type(model).__name__} has no place for, for "
                f"example {left[0]}: use the folder that the file was made from."
            )

    def narrow_as_stored(self, model: torch.nn.Module) -> None:
        """Give each fp32 parameter of `model`, read from the file, the 16-bit type of its matrices where that holds it.

        Nothing is rounded: what was quantized stays in fp32, and so do vectors that the file has more digits of.
        """
        found = {tensor.tensor_type.name for tensor in self._reader.tensors if len(tensor.shape) > 1}
        dtype = {("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(found - {"F32"}))
        for parameter in model.parameters() if dtype is not None else ():
            narrow = parameter.data.to(dtype)
            if torch.equal(narrow.to(parameter.dtype), parameter.data):
                parameter.data = narrow


def _block(name: str) -> int:
    """The layer that a tensor belongs to; -1 outside of them."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
