"""A safetensors export that was killed goes on: finished shards stay in a hidden folder that names what they are of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import CheckpointError
from .fold import LayerError
from .fold_plan import WeightedAdapter
from .formats.atomic import check_output_folder, install_folder, output_errors, write_file
from .formats.checkpoint_dir import read_json

NOTE = ".export.json"


def fingerprint(base: Path, adapters: Sequence[WeightedAdapter], options: dict[str, Any]) -> str:
    """SHA-256 of what decides every byte of an export: the base's files by size and time, adapters by content, options."""
    digest = hashlib.sha256(json.dumps([__version__, options], sort_keys=True, default=str).encode())
    for file in sorted(base.iterdir()):
        status = file.stat()
        digest.update(f"{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns}".encode())
    for adapter in adapters:
        digest.update(json.dumps([adapter.label, adapter.weight, adapter.files.config], sort_keys=True).encode())
        for key in sorted(adapter.files.tensors):
            tensor = adapter.files.tensors[key].contiguous()
            digest.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def resumable_folder(path: Path, mark: str, *, overwrite: bool) -> Iterator[Path]:
    """As `new_folder`, but what an unfinished block leaves behind is yielded again to the next one with the same `mark`."""
    path = Path(os.path.abspath(path))
    check_output_folder(path, overwrite=overwrite)
    partial = path.parent / f".{path.name}.partial"
    with output_errors(path):
        if read_mark(partial) != mark:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_file(partial / NOTE, json.dumps({"mark": mark, "layers": []}))
        yield partial
        (partial / NOTE).unlink()
        install_folder(partial, path)


def read_mark(partial: Path) -> str | None:
    try:
        mark = read_json(partial / NOTE).get("mark")
    except CheckpointError:
        return None
    return mark if isinstance(mark, str) else None


def note_layers(partial: Path, layers: Sequence[LayerError]) -> None:
    """Keep the errors measured so far beside the shards that they are of."""
    note = read_json(partial / NOTE)
    write_file(partial / NOTE, json.dumps(note | {"layers": [layer.to_dict() for layer in layers]}))


def noted_layers(partial: Path) -> list[LayerError]:
    return [LayerError(**layer) for layer in read_json(partial / NOTE)["layers"]]
