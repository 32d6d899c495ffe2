"""template + spec -> C++ source -> shared library, on first use, cached by content.

The cache folder holds `<op>-<hash>.cpp` beside `<op>-<hash>.so`; the hash is over the source, whose header names the
template, the spec, the compiler with its version and the flags. Files appear by renaming, so processes may race. What a
crash of the machine or a full disk left of one is not used: loading a library that was cut short kills the process, so its
digest stands in `<op>-<hash>.so.sha256`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import torch

from ...errors import KernelError
from ...nf4 import CODE_BOOKS, code_book, code_bounds
from . import devices

TEMPLATES = Path(__file__).parent
PURPOSES = {
    "dequantize_4bit": "4-bit codes and (double-quantized) scales -> fp32, bf16 or fp16 weight",
    "quantize_4bit": "fp32, bf16 or fp16 weight -> 4-bit codes and fp32 block scales",
    "linear_4bit_small": "y = x @ W^T for a few rows of x, straight from 4-bit codes",
    "wide_linear_4bit_small": "y = x @ W^T for a few rows of x, straight from 4-bit codes, in fp32",
    "wide_gemm": "sums of products of dense and 4-bit matrices in fp32, rounded once",
    "paged_step": "AdamW or Lion over pages of 32-bit or 8-bit optimizer state",
    "attention": "softmax(q k^T + mask) v by blocks, and its gradients",
    "wide_attention": "softmax(q k^T + mask) v by blocks with fp32 products, and its gradients",
    "cross_entropy": "rows of logits -> their losses, and the logits' gradient",
    "low_rank": "the skinny products of LoRA: x @ A^T, y += h @ B^T, and their gradients",
}
# No fused multiply-add unless a kernel asks for one: every product is rounded on its own, as in the torch reference.
# No errno from sqrt: a loop that may set it stays scalar.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
_HAS = {"avx2": devices.has_avx2, "avx512_bf16": devices.has_avx512_bf16}


def instruction_sets() -> tuple[str, ...]:
    """What this machine's architecture can have, best first; which of them it has is asked at run time."""
    return ("avx512", "avx2", "portable") if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def find_compiler() -> str | None:
    """The C++ compiler that Inductor uses: its configuration where it is loaded, else $CXX, else g++ (clang++)."""
    config = sys.modules.get("torch._inductor.config")
    if config is not None:
        known = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else (config.cpp.cxx,)
    else:
        known = (os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"),)
    return next((path for name in known if name and (path := shutil.which(name))), None)


@functools.cache
def compiler_version(compiler: str) -> str:
    """First line of `compiler --version`. Raises KernelError if it does not run."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(
            f"The C++ compiler {compiler!r} does not run ({str(error).rstrip('.')}): set CXX to one that does."
        ) from error
    return done.stdout.partition("\n")[0]


def compiler_flags() -> tuple[str, ...]:
    """Flags of every library; OpenMP except where the platform's default compiler lacks it."""
    return _FLAGS if sys.platform == "darwin" else (*_FLAGS, "-fopenmp")


def cache_dir() -> Path:
    """$QLORA_COMPILE_CACHE_DIR, else a folder of this user's beside Inductor's cache. Made if it does not exist.

    Raises KernelError if it belongs to somebody else, whose libraries we would run, or cannot be made.
    """
    chosen = os.environ.get("QLORA_COMPILE_CACHE_DIR")
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    beside = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir()) / "torchinductor"))
    folder = Path(chosen) if chosen else beside.parent / f"qlora_compile_{user}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"The kernel cache {folder} cannot be made: {error}. Set QLORA_COMPILE_CACHE_DIR.") from error
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise KernelError(f"The kernel cache {folder} belongs to another user. Set QLORA_COMPILE_CACHE_DIR.")
    return folder


def template_environment() -> jinja2.Environment:
    """Reads the templates beside this file; a name that the template uses and nobody gave is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # source code, not HTML
    )


def render(op: str, build: str) -> str:
    """The C++ source of an op. `build` (compiler, version, flags) stands in its header."""
    bounds = {}
    for name in CODE_BOOKS:
        midpoints, order = code_bounds(name)
        ascending = order.tolist()
        literals = [_literal(v) for v in midpoints.tolist()]
        bounds[name] = {"bounds": literals, "order": ascending, "sorted": ascending == list(range(16))}
    template = f"{op}.cpp.jinja"
    return (
        template_environment()
        .get_template(template)
        .render(
            op=op,
            purpose=PURPOSES[op],
            template=f"runtime/kernels/{template}",
            isas=instruction_sets(),
            code_books={name: [_literal(v) for v in values] for name, values in CODE_BOOKS.items()},
            code_books_bf16={name: _bf16_bits(name) for name in CODE_BOOKS},
            bounds=bounds,
            build=build,
        )
    )


def _literal(value: float) -> str:
    return f"{value.hex()}f"  # hexadecimal: exact


def _bf16_bits(quant_type: str) -> list[int]:
    return [bits & 0xFFFF for bits in code_book(quant_type).bfloat16().view(torch.int16).tolist()]


def write_source(op: str) -> Path:
    """Renders an op into the cache folder and returns the path. Raises KernelError (no compiler, no folder)."""
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("There is no C++ compiler: install g++ or clang++, or set CXX to one.")
    build = f"{' '.join([compiler, *compiler_flags()])}  # {compiler_version(compiler)}"
    source = render(op, build)
    path = cache_dir() / f"{op}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.cpp"
    write_once(path, source.encode())
    return path


def write_once(path: Path, data: bytes) -> None:
    """The file with these bytes, written unless it has them. Raises KernelError."""
    if _read(path) != data:
        write_atomically(path, data)


def write_atomically(path: Path, data: bytes) -> None:
    """By a temporary file and a rename. Raises KernelError."""
    with _replacing(path) as temporary:
        Path(temporary).write_bytes(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary file's name; what was written there is on the disk when it gets the path's name, and gone after an error.
    Raises KernelError."""
    with writing_to(path.parent):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises KernelError for what the system refuses there."""
    try:
        yield
    except OSError as error:
        raise KernelError(
            f"The kernel cache {folder} cannot be written: {error}. Set QLORA_COMPILE_CACHE_DIR."
        ) from error


def _read(path: Path) -> bytes | None:
    """None for a file that is not there or cannot be read: it is written again."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def compile_library(source: Path, library: Path, compiler: str, flags: tuple[str, ...]) -> None:
    """`compiler flags source -o library`, renamed into place once its digest stands beside it: of two processes at once
    one may leave the other's, and then it is built again. Raises KernelError, with the compiler's message if it fails."""
    with _replacing(library) as temporary:
        command = [compiler, *flags, str(source), "-o", temporary]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise KernelError(f"The C++ compiler {compiler!r} does not run: {error}.") from error
        if done.returncode != 0:
            first_lines = "\n".join(done.stderr.strip().splitlines()[:20])
            raise KernelError(f"The C++ compiler failed on {source} ({' '.join(command)}):\n{first_lines}")
        write_atomically(_digest_file(library), _digest(Path(temporary).read_bytes()))


def _digest_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _is_whole(library: Path) -> bool:
    data = _read(library)
    return data is not None and _digest(data) == _read(_digest_file(library))


def bind(op: str, *types: Any, library: str = "", needs: str = "") -> Any:
    """The C function `qlora_<op>` of a library (of its own name, if none is given), with the types of its arguments.

    needs: "avx2" or "avx512_bf16", what it is written for. On a machine without it the result is None and nothing is built;
    so it is where the library's own `qlora_has_<library>` says no. Raises KernelError.
    """
    if needs and not _HAS[needs]():
        return None
    name = library or op
    loaded = load(name)
    if needs and not getattr(loaded, f"qlora_has_{name}")():
        return None
    function = getattr(loaded, f"qlora_{op}")
    function.argtypes, function.restype = types, None
    return function


@functools.cache
def load(op: str) -> Any:
    """The op's shared library (`ctypes.CDLL`), compiled if the cache has none. Raises KernelError."""
    source = write_source(op)
    library = source.with_suffix(".so")
    compiler = find_compiler()
    assert compiler is not None  # write_source raised otherwise
    if _is_whole(library):
        try:
            return ctypes.CDLL(str(library))
        except OSError:
            pass  # built where other libraries are, in a folder that machines share: build it again
    compile_library(source, library, compiler, compiler_flags())
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"The compiled kernel {library} cannot be loaded: {error}.") from error
