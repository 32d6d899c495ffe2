"""An export that was killed goes on: what it finished stays in a hidden folder that names what it is of.

Finished are shards of safetensors, single 4-bit weights, and tensors at the beginning of a GGUF file.
"""

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
from .formats.atomic import (
    check_output_file,
    check_output_folder,
    install_file,
    install_folder,
    output_errors,
    write_file,
)
from .formats.checkpoint_dir import read_json
from .quantized_base import SIDE_FILE

NOTE = ".export.json"


def fingerprint(base: Path, adapters: Sequence[WeightedAdapter], options: Sequence[Any]) -> str:
    """SHA-256 of what decides every byte of an export: the base's files by size and time, adapters by content, options."""
    digest = hashlib.sha256(json.dumps([__version__, *options], sort_keys=True, default=str).encode())
    for file in sorted(base.iterdir()) if base.is_dir() else [base] if base.exists() else []:
        status = file.stat()
        digest.update(f"{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns}".encode())
    for adapter in adapters:
        said = [adapter.label, adapter.weight, adapter.full, adapter.files.config]
        digest.update(json.dumps(said, sort_keys=True).encode())
        if adapter.folder is not None and (adapter.folder / SIDE_FILE).is_file():
            digest.update((adapter.folder / SIDE_FILE).read_bytes())
        for key in sorted(adapter.files.tensors):
            tensor = adapter.files.tensors[key].contiguous()
            digest.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def resumable_folder(path: Path, mark: str, *, overwrite: bool, file: str | None = None) -> Iterator[Path]:
    """As `new_folder`, but what an unfinished block leaves behind is yielded again to the next one with the same `mark`.

    With `file`, that file of the folder becomes `path`, not the folder.
    """
    path = Path(os.path.realpath(path))
    (check_output_folder if file is None else check_output_file)(path, overwrite=overwrite)
    partial = path.parent / f".{path.name}.partial"
    with output_errors(path):
        if _read_mark(partial) != mark:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            note(partial, mark=mark, layers=[])
        yield partial
        (partial / NOTE).unlink()
        if file is None:
            install_folder(partial, path, overwrite=overwrite)
            return
        try:
            install_file(partial / file, path, overwrite=overwrite)
        finally:
            if not (partial / file).exists():
                shutil.rmtree(partial)


def note(partial: Path, **values: Any) -> None:
    """Keep `values` beside what is finished: they are there once this returns, or the ones before."""
    noted = read_json(partial / NOTE) if (partial / NOTE).is_file() else {}
    write_file(partial / NOTE, json.dumps(noted | values))


def read_note(partial: Path) -> dict[str, Any]:
    """All that was noted; {"layers": []} where nothing can be resumed from."""
    return read_json(partial / NOTE) if (partial / NOTE).is_file() else {"layers": []}


def note_layers(partial: Path, layers: Sequence[LayerError], **values: Any) -> None:
    """Keep the errors measured so far beside the tensors that they are of."""
    note(partial, layers=[layer.to_dict() for layer in layers], **values)


def noted_layers(partial: Path) -> list[LayerError]:
    return [LayerError(**layer) for layer in read_note(partial)["layers"]]


def _read_mark(partial: Path) -> str | None:
    try:
        mark = read_json(partial / NOTE).get("mark")
    except CheckpointError:
        return None
    return mark if isinstance(mark, str) else None
