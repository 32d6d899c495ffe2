"""Generated kernels, found by (op, device type). An op without one runs its plain-torch reference."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# the modules named *_kernels register candidates
from . import (
    attention_kernels,
    autotune,
    cpp_build,
    cpu,
    devices,
    dispatch,
    expert_kernels,
    gpu,
    lora_kernels,
    loss_kernels,
)

if torch.cuda.is_available() and gpu.is_available():
    from . import triton_lora

    triton_lora.register()

__all__ = [
    "attention_kernels",
    "choose_kernel",
    "devices",
    "dispatch",
    "expert_kernels",
    "find",
    "lora_kernel",
    "lora_kernels",
    "loss_kernels",
    "runs",
    "source_files",
]


@functools.cache
def find(op: str, device_type: str) -> Callable[..., Any] | None:
    """The kernel of `op` ("dequantize_4bit", ...) on a device type, built on first use; None where there is none.

    Raises KernelError if the compiler fails on the generated source.
    """
    if device_type == "cuda" and op in gpu.OPS:
        return gpu.make(op, torch.device("cuda", torch.cuda.current_device()))
    if device_type != "cpu" or op not in cpu.KERNELS:
        return None
    if cpp_build.find_compiler() is None:
        _warn_no_compiler()
        return None
    return cpu.KERNELS[op]()


@functools.cache
def _warn_no_compiler() -> None:
    warnings.warn(
        "No C++ compiler was found, so NF4 work on the CPU runs in plain torch, many times slower. Install g++ "
        "(Debian, Ubuntu: apt install g++) or clang++, or set CXX, and start again for the fast path.",
        RuntimeWarning,
        stacklevel=3,
    )


def is_generated(op: str, device_type: str) -> bool:
    """Whether a kernel has, or at its first launch will have, a generated source on a device type."""
    if device_type == "cuda":
        return gpu.is_available()
    return device_type == "cpu" and op in cpu.KERNELS and cpp_build.find_compiler() is not None


def runs(op: str, device_type: str) -> bool:
    """Whether a kernel works here. `find` knows, but for those that only a GPU's candidates call: they declined then."""
    return (device_type == "cuda" and op not in gpu.OPS) or find(op, device_type) is not None


def source_files(op: str, device_type: str, *, of_others: bool = False) -> tuple[Path, ...]:
    """The generated source files of a kernel, for the report. A GPU's kernel has one for each spec that this process has
    launched; `of_others`: before the first launch, the newest that any process wrote."""
    if not is_generated(op, device_type):
        return ()
    if device_type == "cpu":
        return (cpp_build.write_source(cpu.TEMPLATES[op]),)
    from . import triton_build

    return triton_build.loaded(op) or (triton_build.latest(op) if of_others else ())


def source_name(op: str, device_type: str) -> str:
    """The name that kernels which one generated file holds share: on a CPU several do."""
    return cpu.TEMPLATES.get(op, op) if device_type == "cpu" else op


def choose_kernel(
    op: str,
    forced: str = "",
    *,
    rows: int,
    n: tuple[int, ...],
    k: int,
    dtype: torch.dtype,
    device: str,
    rank: int = 0,
    quant_type: str = "none",
    block_size: int = 0,
    dropout: bool = False,
    barred: tuple[tuple[str, str], ...] = (),
    tune: bool = False,
) -> dispatch.Choice:
    """What runs an op of `dispatch.OPS` at these sizes, and why; with `tune`, after measuring on this machine. `barred`: see
    `dispatch.choose`.

    Raises KernelError if no kernel takes it.
    """
    problem = dispatch.Problem(op, dispatch.bucket(rows), n, k, rank, dtype, quant_type, block_size, device, dropout)
    if tune and not forced:
        autotune.measure(problem)
    return dispatch.choose(problem, forced, barred)


def lora_kernel(
    op: str,
    rows: int,
    out_features: tuple[int, ...],
    k: int,
    rank: int,
    dtype: torch.dtype,
    quant_type: str,
    block_size: int,
    device_type: str,
    dropout: bool,
    forced: str = "",
) -> Callable[..., Any]:
    """What runs `lora_linear` or its backward at these sizes. Raises KernelError if nothing does."""
    problem = dispatch.Problem(
        op, dispatch.bucket(rows), out_features, k, rank, dtype, quant_type, block_size, device_type, dropout
    )
    run = dispatch.choose(problem, forced).candidate.run
    assert run is not None
    return run
