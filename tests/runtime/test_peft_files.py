"""PEFT folders without a model: what stock peft writes is read, what we write stock peft loads, bad input is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_compile.errors import CheckpointError
from qlora_compile.runtime.formats.peft_files import (
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    WEIGHTS_FILE,
    read_adapter,
    write_adapter,
)

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "rank_pattern": {"up": 2},
    "alpha_pattern": {"up": 5},
    "target_modules": ["up", "down"],
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        f"{PREFIX}net.up.lora_A.weight": torch.randn(2, 7),
        f"{PREFIX}net.up.lora_B.weight": torch.randn(11, 2),
        f"{PREFIX}net.down.lora_A.weight": torch.randn(3, 11),
        f"{PREFIX}net.down.lora_B.weight": torch.randn(7, 3),
        f"{PREFIX}net.norm.weight": torch.randn(7),
    }


def write_raw(folder: Path, config: object, values: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(values, folder / WEIGHTS_FILE)
    return folder


def test_round_trip_layers_and_scaling(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", CONFIG, tensors(), {"note.json": "{}"})
    files = read_adapter(tmp_path / "a")
    layers = files.layers()
    assert files.config == CONFIG | {"target_modules": ["down", "up"]}
    assert list(layers) == ["net.down", "net.up"]
    assert (layers["net.up"].rank, layers["net.up"].alpha, layers["net.up"].scaling) == (2, 5, 2.5)
    assert (layers["net.down"].rank, layers["net.down"].scaling) == (3, 2)
    assert torch.equal(layers["net.up"].b, tensors()[f"{PREFIX}net.up.lora_B.weight"])
    assert list(files.full_parameters()) == ["net.norm.weight"]
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "note.json"]


def test_rslora_scales_by_the_root_of_each_rank(tmp_path: Path) -> None:
    layers = read_adapter(write_raw(tmp_path / "a", CONFIG | {"use_rslora": True}, tensors())).layers()
    assert layers["net.up"].scaling == 5 / math.sqrt(2) and layers["net.down"].scaling == 6 / math.sqrt(3)


def test_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", CONFIG | {"target_modules": {"up", "down"}}, tensors())
    backwards = dict(reversed(tensors().items()))
    write_adapter(tmp_path / "b", dict(reversed(CONFIG.items())), backwards)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_writing_into_a_folder_with_other_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    write_adapter(tmp_path, CONFIG, tensors())
    changed = tensors() | {f"{PREFIX}net.norm.weight": torch.zeros(7)}
    write_adapter(tmp_path, CONFIG, changed)
    assert sorted(f.name for f in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "run.json"]
    assert not read_adapter(tmp_path).full_parameters()["net.norm.weight"].any()


def test_shared_and_strided_tensors_can_be_written(tmp_path: Path) -> None:
    shared = torch.randn(7, 3)
    values = {f"{PREFIX}d.lora_A.weight": shared.t(), f"{PREFIX}d.lora_B.weight": shared}
    layer = read_adapter(write_adapter(tmp_path / "a", CONFIG, values)).layers()["d"]
    assert torch.equal(layer.a, shared.t()) and torch.equal(layer.b, shared)


def test_tensors_do_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "a", CONFIG, tensors())
    files = read_adapter(folder)
    raw = (folder / WEIGHTS_FILE).read_bytes()
    with open(folder / WEIGHTS_FILE, "r+b") as file:
        file.write(b"\0" * len(raw))
    assert all(torch.equal(files.tensors[key], value) for key, value in tensors().items())


def drop(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: values.__delitem__(f"{PREFIX}{key}")


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"peft_type": "LOHA"}, None, "'LOHA', only 'LORA'"),
        ({"use_dora": True}, None, "no magnitude vector, but use_dora is True"),
        ({"lora_bias": True}, None, "no bias vector, but lora_bias is True"),
        ({"layer_replication": [[0, 2]]}, None, "layer replication"),
        ({"trainable_token_indices": [1]}, None, "trainable tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, None, "pissa_niter_4"),
        ({"lora_alpha": "6"}, None, "lora_alpha is '6'"),
        ({"r": None}, None, "a rank is None"),
        ({"r": True}, None, "a rank is True"),
        ({"rank_pattern": {"(": 2}}, None, "no regular expression"),
        ({"rank_pattern": [2]}, None, "rank_pattern is"),
        ({"rank_pattern": {}}, None, r"net.up: lora_A \[2, 7\] and lora_B \[11, 2\] do not agree with the rank 3"),
        ({}, drop("net.up.lora_B.weight"), "net.up has no lora_B"),
        ({}, drop("net.down.lora_A.weight"), "net.down has no lora_A"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_A.weight": torch.ones(3, 7)}), "do not agree with the rank 2"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_A.weight": torch.ones(2, 7, 1, 1)}), "not matrices"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_A.weight": torch.ones(2, 7).int()}), "not floating point"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_A.weight": torch.full((2, 7), math.nan)}), "NaN or infinite"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_magnitude_vector": torch.ones(11)}), "use_dora is False"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_B.bias": torch.ones(11)}), "lora_bias is False"),
        ({}, lambda v: v.update({f"{PREFIX}net.up.lora_A.default.weight": torch.ones(2, 7)}), "not supported"),
        ({}, lambda v: v.update({"net.up.lora_A.weight": torch.ones(2, 7)}), "does not start with"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, Any], edit: Callable[[dict[str, torch.Tensor]], None] | None, message: str
) -> None:
    values = tensors()
    if edit is not None:
        edit(values)
    folder = write_raw(tmp_path / "a", CONFIG | changes, values)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter folder at"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is it a PEFT adapter"):
        read_adapter(tmp_path)
    folder = write_raw(tmp_path / "adapter", CONFIG, tensors())
    with pytest.raises(CheckpointError, match=f"did you mean {folder}"):
        read_adapter(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is missing"):
        read_adapter(folder)
    config = dict(CONFIG)
    del config["r"]
    with pytest.raises(CheckpointError, match="does not say its rank r"):
        read_adapter(write_raw(folder, config, tensors()))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_adapter(write_raw(folder, CONFIG, {}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"peft_type": "LORA"', "[" * 100_000])
def test_corrupt_config_is_refused(tmp_path: Path, text: str) -> None:
    folder = write_raw(tmp_path / "a", CONFIG, tensors())
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="is corrupt"):
        read_adapter(folder)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "a", CONFIG, tensors())
    raw = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_adapter(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil_was_here"),))


def test_pickles_are_refused_unless_asked_for_and_never_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_raw(tmp_path / "a", CONFIG, tensors())
    (folder / WEIGHTS_FILE).unlink()
    torch.save(tensors(), folder / PICKLE_FILE)
    with pytest.raises(CheckpointError, match="is a pickle"):
        read_adapter(folder)
    read = read_adapter(folder, allow_pickle=True)
    assert all(torch.equal(read.tensors[key], value) for key, value in tensors().items())
    for content in (Evil(), [1, 2], {"a": 1}):
        torch.save(content, folder / PICKLE_FILE)
        with pytest.raises(CheckpointError, match=r"cannot be read safely|something else"):
            read_adapter(folder, allow_pickle=True)
    (folder / PICKLE_FILE).write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        read_adapter(folder, allow_pickle=True)
    assert not (tmp_path / "evil_was_here").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([*CONFIG, "use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out"]), json_values)
def test_any_value_in_the_config_is_used_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = write_raw(tmp_path_factory.mktemp("fuzz"), CONFIG | {key: value}, tensors())
    try:
        layers = read_adapter(folder).layers()
    except CheckpointError:
        return
    assert all(math.isfinite(layer.scaling) for layer in layers.values())


def test_stock_peft_reads_ours_and_we_read_stock_peft(
    tmp_path: Path, tiny_llama: Callable[..., torch.nn.Module]
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=5,
        lora_alpha=9,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 4},
        use_rslora=True,
        init_lora_weights=False,
        modules_to_save=["model.norm"],
    )
    model = peft.get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path / "theirs")
    files = read_adapter(tmp_path / "theirs")
    for path, layer in files.layers().items():
        theirs = model.base_model.model.get_submodule(path)
        assert layer.scaling == pytest.approx(theirs.scaling["default"], rel=1e-12)
        delta = layer.scaling * layer.b @ layer.a
        # One fp32 product each, in whatever order: a few units of 2^-24 of the largest term.
        torch.testing.assert_close(delta, theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    assert list(files.full_parameters()) == ["model.norm.weight"]

    write_adapter(tmp_path / "ours", files.config, files.tensors)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
