"""template + spec -> Triton source, a Python module in the kernel cache -> its kernels, compiled by Triton at launch.

A spec holds structural choices only (which code book, nested scales or not, how many adapters); sizes are
`tl.constexpr` parameters of the kernel. The file is named by the hash of its text, so that a new template is a new file,
and processes that race write the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import KernelError
from ...nf4 import CODE_BOOKS, code_bounds
from . import cpp_build

PURPOSES = {
    "dequantize_4bit": ("4-bit codes and (double-quantized) scales -> dense weight", "qlora::dequantize_4bit"),
    "quantize_4bit": ("dense weight -> 4-bit codes and fp32 block scales", "qlora::quantize_4bit"),
    "lora_down": ("h = dropout(x) A^T for all adapters of a group in one read of x", "x @ A.t() in qlora::lora_linear"),
    "lora_up": ("y (+)= bias + sum_j scale_j (h_j B_j^T), one pass over y", "y.addmm_(h, B.t()) in qlora::lora_linear"),
    "lora_over_tokens": ("scale left^T right, summed over the tokens: dA and dB", "g.t() @ x, dy.t() @ h"),
    "paged_step": (
        "AdamW or Lion over pages of 32-bit or 8-bit optimizer state",
        "torch operators on views of the pages",
    ),
    "cross_entropy": ("rows of logits -> their losses, and the logits' gradient", "qlora::linear_cross_entropy"),
    "dropout_mask": ("the mask of a seed, as a tensor", "LoRAGroup.mask"),
    "lora_linear_small": (
        "y_i = x W_i^T + b_i + sum_j scale_j h_j B_j^T for a few rows of x, straight from the codes",
        "qlora::lora_linear with M <= 64",
    ),
    "lora_linear_gemm": (
        "y = x W^T + b + sum_j scale_j h_j B_j^T, persistent, W decoded between load and product",
        "qlora::lora_linear with many rows",
    ),
    "lora_linear_dx": (
        "dx = sum_i dy_i W_i + sum_j g_j A_j: one fp32 accumulation over the group",
        "dx of qlora::lora_linear_backward",
    ),
}


def _book(quant_type: str) -> dict[str, Any]:
    midpoints, order = code_bounds(quant_type)
    codes = order.tolist()
    packed = sum(code << 4 * position for position, code in enumerate(codes))
    # repr of an fp32 value held in a Python float: exact
    return {"bounds": midpoints.tolist(), "sorted": codes == list(range(16)), "packed_order": packed}


def render(op: str, **spec: Any) -> str:
    """The Triton source of an op for a spec (the names that its template uses)."""
    purpose, replaces = PURPOSES[op]
    spec_line = ", ".join(f"{name}={value}" for name, value in spec.items()) or "none"
    spec = {
        "uses_codes": True,
        "uses_tiles": False,
        "rows": False,
        "double_quant": False,
        "quant_type": "nf4",
        "dropout": False,
    } | spec
    scales = "absmax, absmax_scale, absmax_offset, dynamic_map" if spec["double_quant"] else "absmax"
    template = f"{op}.py.jinja"
    return (
        cpp_build.template_environment()
        .get_template(template)
        .render(
            op=op,
            purpose=purpose,
            replaces=replaces,
            template=f"runtime/kernels/{template}",
            spec_line=spec_line,
            scales=scales,
            code_books=CODE_BOOKS,
            bounds={name: _book(name) for name in CODE_BOOKS},
            **spec,
        )
    )


@functools.cache
def write_source(op: str, **spec: Any) -> Path:
    """Renders an op into the cache folder and returns the path. Raises KernelError (no folder)."""
    source = render(op, **spec)
    path = cpp_build.cache_dir() / f"{op}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    cpp_build.write_once(path, source.encode())
    return path


_loaded: dict[str, list[Path]] = {}  # by op, in order: each spec is loaded when it is first launched


def loaded(op: str) -> tuple[Path, ...]:
    """The generated files of an op that this process loaded, one for each spec; those that are still there."""
    return tuple(path for path in dict.fromkeys(_loaded.get(op, ())) if path.exists())


def latest(op: str) -> tuple[Path, ...]:
    """The newest generated file of an op in the cache, of whichever process and spec; none if there is none."""
    newest = max(cpp_build.cache_dir().glob(f"{op}-*.py"), key=lambda path: path.stat().st_mtime, default=None)
    return () if newest is None else (newest,)


@functools.cache
def load(op: str, **spec: Any) -> ModuleType:
    """The generated module: `load(op).<op>[grid](...)` launches. Raises KernelError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise KernelError("Kernels for a GPU need the package 'triton', which comes with torch's CUDA and ROCm builds.")
    path = write_source(op, **spec)
    name = f"qlora_compile_generated.{path.stem.replace('-', '_')}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # Triton reads the functions' source through it
    found.loader.exec_module(module)
    _loaded.setdefault(op, []).append(path)
    return module
