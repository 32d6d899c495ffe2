"""Every kernel of this device: its numbers against fp64 from the same weights, or against its reference.

Used by gpu.py. M rows of x, N output features, K input features.
"""

from __future__ import annotations

import functools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from gpu_run import say
from gpu_timing import synchronize
from torch import Tensor

import qlora_compile as qc
from qlora_compile.lora_group import LoRAGroup
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import dispatch
from qlora_compile.runtime.kernels.dispatch import Problem

RANK = 16
TOLERANCE = 3 * 2**-8  # of the largest value: bf16 keeps 8 bits, a result passes through three roundings (h or g, x, y)
OPS = ("dequantize_4bit", "quantize_4bit", "paged_step")
GPU_OPS = (*OPS, "cross_entropy", "dropout_mask")  # on a CPU plain torch may do these
Sizes = tuple[int, tuple[int, ...], int, float]  # M, N of each linear, K, dropout
ODD: tuple[Sizes, ...] = (
    (0, (70, 33), 96, 0.25),
    (1, (70, 33), 96, 0.0),
    (5, (33,), 160, 0.0),
    (67, (48, 21, 9), 224, 0.25),
)
# what is timed takes these ways too: eight weight rows a program, K divided over programs, whole tiles
TIMED: tuple[Sizes, ...] = (
    (1, (9216, 1024), 4096, 0.0),
    (16, (512, 256), 4096, 0.0),
    (64, (512,), 4096, 0.0),
    (300, (512, 256), 4096, 0.0),
)


class Exact(NamedTuple):
    """In fp64: y_i and, by name, dx, dA_i, dB_i; h in bf16, as kernels get it."""

    ys: dict[str, Tensor]
    grads: dict[str, Tensor]
    h: Tensor


def group_of(sizes: Sequence[int], k: int, device: str, dropout: float = 0.0) -> tuple[LoRAGroup, list[Tensor]]:
    """A random group of quantized linears with an adapter each, bf16, and its dense bf16 weights."""
    data, dense = [], []
    for n in sizes:
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / math.sqrt(k)
        q = qc.quantize_4bit(weight)
        data.append(q)
        dense.append(qc.dequantize_4bit(q))
    on: dict[str, Any] = {"device": device}
    group = LoRAGroup(
        [q.codes for q in data], [q.absmax for q in data], [q.absmax_scale for q in data],
        [q.absmax_offset for q in data],
        [torch.randn(RANK, k, **on) / math.sqrt(k) for _ in sizes], [torch.randn(n, RANK, **on) / 4 for n in sizes],
        [torch.ones((), **on) for _ in sizes], [2.0] * len(sizes), [1] * len(sizes),
        [torch.tensor(7 + i) for i in range(len(sizes))] if dropout else [], dropout, list(sizes), "nf4", 64,
        torch.bfloat16,
    )  # fmt: skip
    return group, dense


def able(op: str, group: LoRAGroup, m: int, k: int, device: str) -> Iterator[dispatch.Candidate]:
    problem = problem_of(op, group, m, k, device)
    for candidate in dispatch.candidates(op, device):
        if candidate.run is not None and candidate.declines(problem) is None:
            yield candidate


def bound_to(candidate: dispatch.Candidate, *args: Any) -> Callable[[], Any]:
    assert candidate.run is not None  # `able` has none without
    return functools.partial(candidate.run, *args)


def problem_of(op: str, group: LoRAGroup, m: int, k: int, device: str) -> Problem:
    sizes = tuple(group.out_features)
    rank = sum(group.ranks())
    return Problem(op, dispatch.bucket(m), sizes, k, rank, torch.bfloat16, "nf4", 64, device, bool(group.dropout))


def guarded(name: str, device: str, wrong: Callable[[str], None], call: Callable[[], Any]) -> Any:
    """What the call returns, or None where it raises, which is told to `wrong`.

    Raises what a device does that has failed for good (an illegal address): nothing it says after that counts.
    """
    try:
        return call()
    except Exception as error:  # noqa: BLE001  # told, and makes the exit code 1
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        first = (str(error).strip().splitlines() or [""])[0]
        wrong(f"{name}: {type(error).__name__}: {first}"[:300])
        synchronize(device)
        return None


def check(device: str, sizes: Sequence[Sizes], wrong: Callable[[str], None]) -> list[float]:
    """Every candidate at these sizes against fp64, every other kernel by its own proof. What is wrong is told to `wrong`.
    Returns the largest error of each comparison."""
    for op in GPU_OPS if device == "cuda" else OPS:
        told: list[str] = []
        if guarded(op, device, told.append, functools.partial(kernels.find, op, device)) is None:
            wrong(told[0] if told else f"{op}: no kernel that gives the reference's numbers")
    errors: list[float] = []
    for one in sizes:
        name = "M={} N={} K={} dropout={}".format(*one)
        errors += guarded(name, device, wrong, functools.partial(check_at, device, *one, wrong)) or []
    return errors


def check_at(
    device: str, m: int, sizes: Sequence[int], k: int, dropout: float, wrong: Callable[[str], None]
) -> list[float]:
    """`check` of one group, each candidate twice: launches that are found again go another way."""
    group, dense = group_of(sizes, k, device, dropout)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    dys = [torch.randn(m, n, device=device, dtype=torch.bfloat16) for n in sizes]
    ys, grads, h = exactly(group, dense, x, dys)
    backward = (("", True, grads), (" without dA and dB", False, {"dx": grads["dx"]}))
    errors: list[float | None] = []
    for again in ("", " again"):
        for candidate in able("lora_linear", group, m, k, device):
            name, call = f"lora_linear {candidate.name} M={m} N={sizes}{again}", bound_to(candidate, group, x, [])
            errors.append(guarded(name, device, wrong, lambda: compare(name, call()[0], ys, wrong)))  # noqa: B023
        for candidate in able("lora_linear_backward", group, m, k, device):
            for what, need_adapters, expected in backward:
                name = f"lora_linear_backward {candidate.name} M={m} N={sizes}{what}{again}"
                call = bound_to(candidate, group, dys, x, h, True, need_adapters)
                errors.append(guarded(name, device, wrong, lambda: compare(name, flat(call()), expected, wrong)))  # noqa: B023
    return [error for error in errors if error is not None]


def flat(grads: tuple[Tensor, list[Tensor], list[Tensor]]) -> list[Tensor]:
    """dx, every dA, every dB."""
    return [grads[0], *grads[1], *grads[2]]


def exactly(group: LoRAGroup, dense: list[Tensor], x: Tensor, dys: list[Tensor]) -> Exact:
    """From the same weights, factors and masks."""
    wide, low, ys = x.double().requires_grad_(), [], []
    a = [factor.double().requires_grad_() for factor in group.lora_a]
    b = [factor.double().requires_grad_() for factor in group.lora_b]
    for i, weight in enumerate(dense):
        dropped = wide * group.mask(i, x).double() if group.dropout else wide
        low.append(dropped @ a[i].t())
        ys.append(wide @ weight.double().t() + group.alpha[i] * low[i] @ b[i].t())
    grads = torch.autograd.grad(ys, [wide, *a, *b], [dy.double() for dy in dys])
    names = ["dx", *[f"dA_{i}" for i in range(len(a))], *[f"dB_{i}" for i in range(len(b))]]
    h = torch.cat(low, 1).detach().to(x.dtype)
    return Exact({f"y_{i}": y.detach() for i, y in enumerate(ys)}, dict(zip(names, grads, strict=True)), h)


def compare(name: str, got: Sequence[Tensor], expected: Mapping[str, Tensor], wrong: Callable[[str], None]) -> float:
    """The largest error, of the largest value of its tensor. NaN is an error too, and so is another shape."""
    errors = {}
    for (part, exact), mine in zip(expected.items(), got, strict=True):
        errors[part] = error_of(mine, exact) if mine.shape == exact.shape else math.nan
    part, worst = max(errors.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    say(f"  {name}: largest error {worst:.1e} of the largest value ({part})")
    if not all(error < TOLERANCE for error in errors.values()):
        wrong(f"{name}: {part} is off by {worst:.1e} of its largest value")
    return worst


def error_of(mine: Tensor, exact: Tensor) -> float:
    """Of its largest value. Of an empty batch only dA and dB are compared, which are zeros: all else is off by far."""
    if not exact.numel():
        return 0.0
    largest = exact.abs().max().clamp(min=torch.finfo(exact.dtype).tiny)
    return ((mine.double() - exact).abs().max() / largest).item()
