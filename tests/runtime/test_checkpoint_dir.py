"""Safetensors folders: what is read lazily, what is refused, and that the streamed writer equals safetensors' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from qlora_compile.errors import CheckpointError, ConfigError, OutputError, QLoRACompileError
from qlora_compile.runtime.formats import atomic
from qlora_compile.runtime.formats.atomic import new_file, new_folder, write_file
from qlora_compile.runtime.formats.checkpoint_dir import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorSpec,
    copy_side_files,
    open_checkpoint,
    parse_size,
    plan_shards,
    write_checkpoint,
)

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5),
    "a.weight": torch.arange(7, dtype=torch.float32),
    "c.flag": torch.tensor([True, False, True]),
    "d.scalar": torch.tensor(2.5, dtype=torch.float16),
    "e.empty": torch.empty(0, 4, dtype=torch.int64),
    "f.ü": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in tensors.items()}


def sharded_folder(folder: Path) -> Path:
    """Two shards by transformers' names, and an index."""
    folder.mkdir()
    weight_map = {}
    for number, keys in enumerate((["a.weight", "c.flag"], ["b.weight"]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: TENSORS[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] |= changes
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_reads_a_single_file_and_shards_alike(tmp_path: Path) -> None:
    sharded = open_checkpoint(sharded_folder(tmp_path / "sharded"))
    wanted = {key: TENSORS[key] for key in ("a.weight", "b.weight", "c.flag")}
    (tmp_path / "single").mkdir()
    save_file(wanted, tmp_path / "single" / SINGLE_FILE)
    single = open_checkpoint(tmp_path / "single")
    assert list(sharded.specs) == list(single.specs) == sorted(wanted)
    assert sharded.specs == single.specs == specs_of(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(sharded.tensor(key), tensor) and torch.equal(single.tensor(key), tensor)


def test_written_bytes_equal_safetensors_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs_of(TENSORS), TENSORS.__getitem__)
    assert (tmp_path / SINGLE_FILE).read_bytes() == save(TENSORS, metadata={"format": "pt"})
    assert not (tmp_path / INDEX_FILE).exists()


def test_shards_round_trip_and_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    sizes = {key: spec.nbytes for key, spec in specs_of(TENSORS).items()}
    contents = []
    for name, keys in (("one", list(TENSORS)), ("two", sorted(TENSORS, reverse=True))):
        folder = tmp_path / name
        folder.mkdir()
        files = write_checkpoint(folder, specs_of({k: TENSORS[k] for k in keys}), TENSORS.__getitem__, 30)
        assert [f.name for f in files] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
        contents.append({f.name: f.read_bytes() for f in folder.iterdir()})
        checkpoint = open_checkpoint(folder)
        for key, tensor in TENSORS.items():
            assert torch.equal(checkpoint.tensor(key), tensor)
    assert contents[0] == contents[1]
    assert json.loads(contents[0][INDEX_FILE])["metadata"]["total_size"] == sum(sizes.values())


def test_a_tensor_larger_than_a_shard_stands_alone() -> None:
    specs = {
        "a": TensorSpec(torch.uint8, (3,)),
        "b": TensorSpec(torch.uint8, (50,)),
        "c": TensorSpec(torch.uint8, (4,)),
    }
    assert plan_shards(specs, 10) == [["a"], ["b"], ["c"]]
    assert plan_shards(specs, 57) == [["a", "b", "c"]]


def test_writer_asks_for_each_tensor_once_and_checks_it(tmp_path: Path) -> None:
    asked: list[str] = []

    def produce(key: str) -> torch.Tensor:
        asked.append(key)
        return TENSORS[key]

    write_checkpoint(tmp_path, specs_of(TENSORS), produce)
    assert sorted(asked) == sorted(TENSORS)
    with pytest.raises(CheckpointError, match=r"'e.empty' should be torch.int64 \[0, 4\], but is torch.float32"):
        write_checkpoint(tmp_path, specs_of(TENSORS), lambda key: TENSORS[key].float())


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    raw = save(TENSORS)
    (tmp_path / SINGLE_FILE).write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)


def test_header_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes((2**62).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        open_checkpoint(tmp_path)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_header_bit_is_refused_or_read_as_something_of_the_same_size(
    tmp_path_factory: pytest.TempPathFactory, position: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    raw = bytearray(save(TENSORS, metadata={"format": "pt"}))
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    raw[position % header_bytes] ^= 1 << bit
    (folder / SINGLE_FILE).write_bytes(raw)
    try:
        checkpoint = open_checkpoint(folder)
        read = [checkpoint.tensor(key) for key in checkpoint.specs]
    except CheckpointError:
        return
    assert sum(t.numel() * t.itemsize for t in read) == len(raw) - header_bytes


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/shard.safetensors", "..", "", "a\\b", "a\0b"]
)
def test_index_must_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    folder = sharded_folder(tmp_path / "base")
    save_file({"b.weight": TENSORS["b.weight"]}, tmp_path / "secret.safetensors")
    edit_index(folder, **{"b.weight": name})
    with pytest.raises(CheckpointError, match="not a file name"):
        open_checkpoint(folder)


def test_bad_indices_are_refused(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "base")
    good = (folder / INDEX_FILE).read_text()
    edit_index(folder, **{"b.weight": "model-00003-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"names the shard model-00003-of-00003.safetensors, which is missing"):
        open_checkpoint(folder)
    (folder / INDEX_FILE).write_text(good)
    edit_index(folder, **{"z.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"holds 'z.weight', but it does not"):
        open_checkpoint(folder)
    (folder / INDEX_FILE).write_text(good.replace('"weight_map": {', '"weight_map": {"a.weight": "x", '))
    with pytest.raises(CheckpointError, match="stands in it twice"):
        open_checkpoint(folder)
    for text in ("{", "[]", '{"metadata": {}}', '{"weight_map": []}', "[" * 100_000):
        (folder / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match="is corrupt"):
            open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "base")
    save_file({key: TENSORS[key] for key in ("a.weight", "b.weight")}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' stands in both"):
        open_checkpoint(folder)


def test_missing_and_pickled_checkpoints_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        open_checkpoint(tmp_path)


def test_side_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "vocab.txt"):
        (source / name).write_text(name)
    for name in ("model.safetensors", INDEX_FILE, "pytorch_model.bin", ".hidden", "adapter_config.json"):
        (source / name).write_text(name)
    for folder in ("additional_chat_templates", "checkpoints"):
        (source / folder).mkdir()
        (source / folder / "a.jinja").write_text(folder)
    names = copy_side_files(source, target)
    assert names == sorted(f.name for f in target.iterdir())
    assert (target / names.pop(0) / "a.jinja").read_text() == "additional_chat_templates"
    assert names == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "vocab.txt"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (77, 77), ("40kb", 40_000)])
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 parsecs", "-1GB", "0", True, "1e400GB", "GB"])
def test_bad_sizes(text: int | str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


class TestAtomic:
    def test_folder_appears_only_at_the_end(self, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "out"
        with new_folder(out) as folder:
            (folder / "a").write_text("1")
            assert not out.exists()
        assert (out / "a").read_text() == "1"
        assert [f.name for f in out.parent.iterdir()] == ["out"]

    def test_error_and_interrupt_leave_nothing(self, tmp_path: Path) -> None:
        for error in (ValueError, KeyboardInterrupt):
            with pytest.raises(error), new_folder(tmp_path / "out") as folder:
                (folder / "a").write_text("1")
                raise error
        assert list(tmp_path.iterdir()) == []

    def test_full_disk_is_one_sentence_and_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="disk is full"), new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise OSError(28, "No space left on device")
        assert list(tmp_path.iterdir()) == []

    def test_occupied_output_is_refused_or_replaced_whole(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")
        with pytest.raises(OutputError, match="not empty"), new_folder(out):
            pass
        with new_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
        assert [f.name for f in out.iterdir()] == ["new"]
        assert [f.name for f in tmp_path.iterdir()] == ["out"]
        with pytest.raises(OutputError, match="not a folder"), new_folder(out / "new", overwrite=True):
            pass

    def test_failed_rename_brings_the_old_folder_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")
        replace = atomic.os.replace

        def fail_for_new(source: Path, target: Path) -> None:
            if (Path(source) / "new").exists():
                raise PermissionError(13, "Permission denied")
            replace(source, target)

        monkeypatch.setattr(atomic.os, "replace", fail_for_new)
        with pytest.raises(OutputError, match="Permission denied"), new_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
        assert [f.name for f in out.iterdir()] == ["old"]

    @pytest.mark.parametrize("renames", [1, 2])
    def test_an_interrupt_after_a_rename_leaves_a_whole_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")
        replace, done = atomic.os.replace, 0

        def interrupted(source: Path, target: Path) -> None:
            nonlocal done
            replace(source, target)
            done += 1
            if done == renames:
                raise KeyboardInterrupt

        monkeypatch.setattr(atomic.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
        assert [f.name for f in tmp_path.iterdir()] == ["out"]
        assert [f.name for f in out.iterdir()] == [("old", "new")[renames - 1]]

    def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(self, tmp_path: Path) -> None:
        out, file = tmp_path / "o.ut", tmp_path / "file.gguf"
        names = (".o.ut.abcd1234.tmp", ".o.ut.abcd1234.old", ".file.gguf.abcd1234.tmp", ".oxut.abcd1234.tmp")
        left, replaced, of_a_file, another = (tmp_path / name for name in names)
        for folder in (left, replaced, of_a_file, another):
            folder.mkdir()
            (folder / "half").write_text("half")
        with new_folder(out) as first:
            assert not left.exists() and replaced.exists()  # which is all that there is of that output
            (first / "a").write_text("1")
            with new_folder(out) as second:
                assert first.exists() and second != first
                (second / "b").write_text("2")
            with new_file(file) as place:
                place.write_text("new")
                assert not of_a_file.exists() and first.exists()
            for path in out.iterdir():
                path.unlink()
        assert [f.name for f in out.iterdir()] == ["a"] and another.exists()
        with new_folder(out, overwrite=True):
            assert not replaced.exists()

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(descriptor: int, operation: int) -> None:
            raise OSError(9, "Bad file descriptor")

        monkeypatch.setattr("fcntl.flock", none)
        left = tmp_path / ".out.abcd1234.tmp"
        left.mkdir()
        with new_folder(tmp_path / "out"):
            pass
        assert sorted(f.name for f in tmp_path.iterdir()) == [left.name, "out"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_link_stays_one(self, tmp_path: Path, overwrite: bool) -> None:
        real, link = tmp_path / "real", tmp_path / "link"
        real.mkdir()
        link.symlink_to(real)
        if overwrite:
            (real / "old").write_text("old")
        with new_folder(link, overwrite=overwrite) as folder:
            (folder / "new").write_text("new")
        assert link.is_symlink() and [f.name for f in real.iterdir()] == ["new"]
        assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]
        (tmp_path / "b.gguf").symlink_to(tmp_path / "a.gguf")
        with new_file(tmp_path / "b.gguf") as file:
            file.write_text("new")
        assert (tmp_path / "b.gguf").is_symlink() and (tmp_path / "a.gguf").read_text() == "new"

    def test_a_folder_that_cannot_be_moved_away(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "old").write_text("old")

        def busy(source: Path, target: Path) -> None:
            raise OSError(16, "Device or resource busy")

        monkeypatch.setattr(atomic.os, "replace", busy)
        with pytest.raises(OutputError, match="busy"), new_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
        assert [f.name for f in tmp_path.iterdir()] == ["out"] and [f.name for f in out.iterdir()] == ["old"]

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_what_came_to_lie_at_a_folder_s_place_stays(self, tmp_path: Path, kind: str) -> None:
        out = tmp_path / "out"
        precious = out / "precious" if kind == "folder" else out
        with pytest.raises(OutputError, match="meanwhile and is left as it is") as caught, new_folder(out) as folder:
            (folder / "new").write_text("new")
            precious.parent.mkdir(exist_ok=True)
            precious.write_text("x")
        beside = Path(str(caught.value).rpartition(" lies in ")[2].removesuffix("."))
        assert precious.read_text() == "x" and (beside / "new").read_text() == "new"
        assert sorted(tmp_path.iterdir()) == sorted([beside, out])

    @pytest.mark.parametrize("links", [True, False])
    def test_what_came_to_lie_at_a_file_s_place_stays(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        if not links:
            monkeypatch.setattr(atomic.os, "link", lambda *names: (_ for _ in ()).throw(OSError(1, "not permitted")))
        out = tmp_path / "out.gguf"
        with pytest.raises(OutputError, match="meanwhile and is left as it is") as caught, new_file(out) as file:
            file.write_text("new")
            out.write_text("precious")
        beside = Path(str(caught.value).rpartition(" lies in ")[2].removesuffix("."))
        assert out.read_text() == "precious" and beside.suffix == ".gguf" and beside.read_text() == "new"
        assert sorted(tmp_path.iterdir()) == sorted([beside, out])
        with new_file(tmp_path / "other.gguf") as file:
            file.write_text("new")
        assert (tmp_path / "other.gguf").read_text() == "new" and len(list(tmp_path.iterdir())) == 3

    def test_file_is_replaced_whole_or_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write_file(tmp_path / "sub" / "a.json", "one")
        assert write_file(file, b"two").read_bytes() == b"two"
        monkeypatch.setattr(atomic, "sync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OutputError, match="disk is full"):
            write_file(file, "three")
        assert file.read_text() == "two" and len(list(file.parent.iterdir())) == 1

    def test_output_below_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / "file" / "out"):
            pass
        with pytest.raises(QLoRACompileError):
            write_file(tmp_path / "file" / "a", "text")


def test_loads_with_safetensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, specs_of(TENSORS), TENSORS.__getitem__)
    loaded = load_file(tmp_path / SINGLE_FILE)
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[k], TENSORS[k]) for k in TENSORS)
