"""The version of this package's sources, for the keys of torch's compile caches.

Our passes run before AOTAutograd computes its key: what they and the configuration do is in the graph, hence in the
key. How the ops in that graph trace (their fakes and their backward), and what is done to graphs after the key was taken
(`regions.py`), is not; so the backend makes this digest an attribute of the graph module, which the key holds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from . import passes

_HERE = Path(__file__).parent
FOLDERS = (_HERE, Path(passes.__file__).parent)


@functools.cache
def sources() -> str:
    """Equal in every process that runs the same version of ours, wherever it is installed."""
    return digest(FOLDERS)


def digest(folders: Iterable[Path]) -> str:
    """Over the names and contents of the Python sources directly in these folders."""
    files = sorted((path.name, path.read_bytes()) for folder in folders for path in folder.glob("*.py"))
    text = b"".join(f"{name} {len(data)}\n".encode() + data for name, data in files)
    return hashlib.sha256(text).hexdigest()[:16]
