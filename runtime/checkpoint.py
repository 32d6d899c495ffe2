"""Checkpoint folders that are whole or not there: `step-N/` with tensors, JSON state and a manifest of SHA-256 sums.

A folder is written under a temporary name, fsynced and renamed; so `kill -9` at any moment leaves the previous
checkpoints as they were. Only safetensors and JSON: nothing of it runs code when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, InputPathError, OutputError
from .formats.atomic import new_folder

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SET_ASIDE = ".set-aside"
OWN_SUM = "sha256_of_this"  # of the manifest's other fields; earlier checkpoints lack it


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors by file ("optimizer": {name: tensor}) and JSON values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `folder/step-N` and return it. Raises OutputError, with nothing half-written, where the disk refuses."""
    target = folder / f"step-{step}"
    # A folder of this step can be there already: left by a run that went on from an earlier one.
    with new_folder(target, overwrite=True) as temporary:
        for name, group in tensors.items():
            _save_tensors(temporary / f"{name}.safetensors", group)
        (temporary / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
        sums = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
        manifest: dict[str, Any] = {"format": FORMAT, "step": step, "sha256": sums}
        manifest[OWN_SUM] = _own_sum(manifest)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return target


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Views of one storage become tensors of their own: safetensors refuses to write shared memory.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises CheckpointError saying which file is missing, damaged or unreadable."""
    if not path.is_dir():
        raise InputPathError(f"There is no checkpoint folder {path}.")
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}.")
    sums, step = manifest.get("sha256"), manifest.get("step")
    if not isinstance(sums, dict) or STATE not in sums or not isinstance(step, int):
        raise CheckpointError(f"{path / MANIFEST} is not a checkpoint's manifest.")
    own = _own_sum(manifest)
    if manifest.get(OWN_SUM, own) != own:
        raise CheckpointError(f"The checkpoint file {path / MANIFEST} is corrupt: its SHA-256 is not the one in it.")
    if path.name.startswith("step-") and path.name != f"step-{step}":
        raise CheckpointError(f"The checkpoint {path} is corrupt: its manifest is of step {step}.")
    for name, wanted in sums.items():
        file = path / Path(name).name
        if _found_sum(file) != wanted:
            raise CheckpointError(f"The checkpoint file {file} is corrupt: its SHA-256 is not the one in {MANIFEST}.")
    try:
        files = [path / name for name in sums if name.endswith(".safetensors")]
        tensors = {file.stem: load_file(file) for file in files}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}.") from error
    return Checkpoint(path, step, tensors, _read_json(path / STATE))


def _own_sum(manifest: Mapping[str, Any]) -> str:
    fields = {name: value for name, value in manifest.items() if name != OWN_SUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _found_sum(file: Path) -> str:
    try:
        if file.is_file():
            return sha256_of(file)
    except OSError as error:
        raise CheckpointError(f"The checkpoint file {file} cannot be read: {error.strerror or error}.") from error
    raise CheckpointError(f"The checkpoint {file.parent} lacks {file.name}.")


def list_checkpoints(folder: Path) -> list[Path]:
    """The `step-N` folders, the lowest step first; temporary and set-aside ones are left out."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        number = path.name.removeprefix("step-")
        if number.isdecimal() and path.is_dir():
            found.append((int(number), path))
    return [path for _, path in sorted(found)]


def load_newest(
    folder: Path, notice: Callable[[str], None], check: Callable[[Checkpoint], None] = lambda checkpoint: None
) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are renamed to `step-N.set-aside`, and `notice` is told of each.

    `check` raises CheckpointError where one lacks something. None where there is no checkpoint at all. Raises
    CheckpointError where there are some, but none of them is valid.
    """
    remove_temporary(folder)
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
            check(checkpoint)
            return checkpoint
        except CheckpointError as error:
            notice(f"{error} Skipped it; trying the one before.")
            set_aside(path)
    damaged = len(list(folder.glob(f"step-*{SET_ASIDE}"))) if folder.is_dir() else 0
    if damaged:  # set aside now, or before: a loop that starts a run again must not write over its record
        raise CheckpointError(
            f"All {damaged} checkpoints in {folder} are damaged or set aside: start in another folder."
        )
    return None


def set_aside(path: Path) -> None:
    """`step-N` -> `step-N.set-aside`, so that it is neither resumed from nor counted among the last K."""
    target = path.with_name(path.name + SET_ASIDE)
    try:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)
    except OSError as error:
        raise OutputError(f"{path} cannot be set aside: {error.strerror}.") from error


def remove_temporary(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for path in folder.glob(pattern) if folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints."""
    for path in list_checkpoints(folder)[:-keep_last]:
        # Renamed first: a kill in the middle must not leave a checkpoint that lacks files.
        doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            os.rename(path, doomed)
        except OSError as error:
            raise OutputError(f"The old checkpoint {path} cannot be removed: {error.strerror}.") from error
        shutil.rmtree(doomed, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"The checkpoint {path.parent} lacks {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint file {path} is corrupt: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"The checkpoint file {path} is corrupt: it is not a JSON object.")
    return value


def sha256_of(path: Path) -> str:
    """The hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
