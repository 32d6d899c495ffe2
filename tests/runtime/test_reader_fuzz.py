"""Files from elsewhere, damaged in any way: each reader gives what the file says or one CheckpointError, nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_compile.errors import CheckpointError, ConfigError
from qlora_compile.runtime.export import export
from qlora_compile.runtime.formats.checkpoint_dir import open_checkpoint
from qlora_compile.runtime.formats.gguf_tokenizer import read_tokenizer
from qlora_compile.runtime.formats.peft_files import read_adapter
from qlora_compile.runtime.quantized_source import QuantizedFolderSource

from .gguf_models import byte_level_tokenizer

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MakeAdapter = Callable[..., Path]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A truncation, a flipped bit (half of them in the header), or a header that claims more than the file holds."""
    kind, where, bit = draw(st.sampled_from(["cut", "flip", "claim"])), draw(st.floats(0, 1)), draw(st.integers(0, 7))
    early = draw(st.booleans())

    def apply(raw: bytes) -> bytes:
        if kind == "cut":
            return raw[: int(where * (len(raw) - 1))]
        if kind == "claim":
            return (int.from_bytes(raw[:8], "little") + 1 + int(where * 2**40)).to_bytes(8, "little") + raw[8:]
        data = bytearray(raw)
        data[int(where * ((min(len(raw), 2000) if early else len(raw)) - 1))] ^= 1 << bit
        return bytes(data)

    return apply


def read_all(source: Any) -> None:
    for key in source.specs:
        assert tuple(source.tensor(key).shape) == source.specs[key].shape


@pytest.fixture(scope="module")
def four_bit_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "four"
    export(tiny_checkpoint, out, format="nf4", max_shard_size="60KB")
    return out


@FUZZ
@given(damage())
def test_a_damaged_checkpoint(tiny_checkpoint: Path, tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(harm((tiny_checkpoint / "model.safetensors").read_bytes()))
    try:
        read_all(open_checkpoint(file))
    except CheckpointError as error:
        assert str(file.parent) in str(error) and "\n" not in str(error)


@FUZZ
@given(damage(), st.integers(0, 100))
def test_a_damaged_four_bit_folder(
    four_bit_folder: Path, tmp_path: Path, harm: Callable[[bytes], bytes], shard: int
) -> None:
    folder = tmp_path / "four"
    if not folder.exists():
        shutil.copytree(four_bit_folder, folder)
    files = sorted(four_bit_folder.glob("*.safetensors"))
    victim = folder / files[shard % len(files)].name
    raw = victim.read_bytes()
    victim.write_bytes(harm(raw))
    try:
        read_all(QuantizedFolderSource(folder))
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        victim.write_bytes(raw)


@FUZZ
@given(damage())
def test_a_damaged_adapter(
    tiny_checkpoint: Path, tmp_path: Path, make_adapter: MakeAdapter, harm: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        make_adapter(folder, torch.nn.ModuleDict({"q_proj": torch.nn.Linear(7, 5), "down_proj": torch.nn.Linear(5, 9)}))
        shutil.copy(folder / "adapter_model.safetensors", tmp_path / "whole")
    (folder / "adapter_model.safetensors").write_bytes(harm((tmp_path / "whole").read_bytes()))
    try:
        files = read_adapter(folder)
    except CheckpointError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in files.tensors.values())


@FUZZ
@given(st.dictionaries(st.text(max_size=12), st.text(max_size=30) | ANYTHING, max_size=4))
def test_any_index(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    """Names that leave the folder among them: nothing outside is opened, nothing but CheckpointError is raised."""
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", "a\0b", ""])
def test_an_index_that_leaves_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="which is not a file name"):
        open_checkpoint(folder)


TOKENIZER_KEYS = {"model": "", "added_tokens": "", "pre_tokenizer": "", "normalizer": ""}
TOKENIZER_KEYS |= {"vocab": "model", "merges": "model", "unk_token": "model", "id": "added", "content": "added"}


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_tokenizer(None).save_pretrained(folder)
    return json.loads((folder / "tokenizer.json").read_text())


@FUZZ
@given(
    st.sampled_from(["model", "added_tokens", "pre_tokenizer", "normalizer", "vocab", "merges", "id", "content"]),
    ANYTHING,
)
def test_any_tokenizer(tokenizer_json: dict[str, Any], tmp_path: Path, key: str, value: Any) -> None:
    content = json.loads(json.dumps(tokenizer_json))
    place = (
        content["model"]
        if key in ("vocab", "merges")
        else content["added_tokens"][0]
        if key in ("id", "content")
        else content
    )
    place[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    try:
        tokenizer = read_tokenizer(tmp_path, 310)
    except (CheckpointError, ConfigError):
        return
    assert len(tokenizer.tokens) == len(tokenizer.types) == 310
    assert all(isinstance(token, str) for token in tokenizer.tokens)
