"""Launches that are found again hand the compiled kernel what Triton's own launch would.

There is no GPU here: a driver whose launches are written down stands in for NVIDIA's. Kernels are compiled for sm_90.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: `pip install triton` (Linux)")

from triton.backends.compiler import GPUTarget  # noqa: E402

from qlora_compile import nf4  # noqa: E402
from qlora_compile.errors import KernelError  # noqa: E402
from qlora_compile.runtime.kernels import (  # noqa: E402
    triton_build,
    triton_codec,
    triton_cross_entropy,
    triton_launch,
    triton_linear,
    triton_low_rank,
    triton_paged_step,
    triton_vector,
)
from qlora_compile.runtime.kernels.triton_low_rank import Dropout, Scale  # noqa: E402
from qlora_compile.runtime.kernels.triton_operands import Adapter, VectorAdapter, Weight  # noqa: E402

launched: list[tuple[Any, ...]] = []


class Launcher:
    """What Triton calls for a launch: grid, stream, function and metadata, then every parameter of the kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        arguments = rest[4:]  # after the packed metadata, the launch's, and two hooks
        launched.append((x, y, z, function, *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]))


class Utils:
    def __init__(self) -> None:
        self.functions: dict[bytes, int] = {}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """No module, so that none is unloaded, and a number for each function."""
        return None, self.functions.setdefault(binary, len(self.functions)), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Driver:
    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utils()

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """Nothing compiled for this driver, and no launch of it, is left behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_launch, "_launches", {})
    for module in (triton_low_rank, triton_linear, triton_vector):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    launched.clear()
    yield
    triton_build.load.cache_clear()


def _bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


M, K, N, R = 2048, 128, 96, 5
WEIGHT = Weight(nf4.quantize_reference(torch.randn(N, K), "nf4", 32, True), N, K, "nf4", 32)
X, Y, H = _bf16(M, K), _bf16(M, N), _bf16(M, 2 * R)
A, B, SCALING = torch.zeros(R, K), torch.zeros(N, R), torch.ones(())
ADAPTERS = [Adapter(part, B, 2.0, SCALING) for part in H.split(R, dim=1)]
SCALE = Scale([2.0, 0.5], [SCALING, SCALING])
DA, SEEDS, BIAS = torch.zeros(R, K), [torch.tensor(7), torch.tensor(8)], torch.zeros(N)
ONE_X, ONE_H, ONE_Y = _bf16(1, K), _bf16(1, R), _bf16(1, N)
ONE_ADAPTER = [VectorAdapter(A, B, 2.0, SCALING)]
CALLS: dict[str, Callable[[], None]] = {
    "dequantize": lambda: triton_codec.dequantize_4bit(*WEIGHT.data, N * K, "nf4", 32, _DENSE),
    "down": lambda: triton_low_rank.lora_down(X, [A, A], H, SCALE, Dropout(SEEDS, 0.75)),
    "up": lambda: triton_low_rank.lora_up(Y, H.split(R, dim=1), [B, B], SCALE, bias=BIAS, accumulate=False),
    "over_tokens": lambda: triton_low_rank.lora_over_tokens([H[:, :R]], X, [DA], dropout=Dropout(SEEDS[:1], 0.75)),
    "sum": lambda: triton_low_rank.sum_splits(_PARTS, DA),
    "vector": lambda: triton_vector.lora_linear_vector(ONE_X, [WEIGHT], [ONE_Y], ONE_H, [ONE_ADAPTER], [BIAS]),
    "paged_step": lambda: triton_paged_step.paged_step(
        PIECES, NUMBERS, lion=False, narrow=True, dtype=1, most=5000, places=PLACES
    ),
    "gemm": lambda: triton_linear.lora_linear_gemm(X, WEIGHT, Y, ADAPTERS, BIAS),
    "dx": lambda: triton_linear.lora_linear_dx(X, [Y, Y], [WEIGHT, WEIGHT], [Adapter(H[:, :R], A)]),
}
PIECES, PLACES = (torch.zeros(3, n, dtype=torch.int64) for n in (6, 2))
NUMBERS = torch.zeros(2, 8)
_DENSE, _PARTS, _SPREAD = _bf16(N, K), torch.zeros(3, R, K), torch.zeros(1024)


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_that_is_found_again_is_the_same_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        triton_low_rank, "_splits", lambda *_, **__: 1
    )  # a split sum has a buffer of its own at each call
    monkeypatch.setattr(triton_vector, "scratch", lambda like, numel: _SPREAD)  # as well
    CALLS[name]()
    by_triton = launched.copy()
    assert len(triton_launch._launches) == len(by_triton) == (2 if name == "vector" else 1)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", None)
    launched.clear()
    for _ in range(2):
        CALLS[name]()
    assert launched == by_triton * 2


def test_addresses_that_are_no_multiple_of_16_have_a_kernel_of_their_own() -> None:
    """Triton tells the compiler which addresses are, so code compiled for one that is may not run for one that is not."""
    buffer = torch.zeros(40 * 96 + 4)
    factor, h = torch.randn(96, 5), torch.randn(40, 5)
    functions = []
    for first in (0, 1, 4, 0, 1):  # elements of 4 bytes
        y = buffer[first : first + 40 * 96].view(40, 96)
        triton_low_rank.lora_up(y, [h], [factor])
        *_, last = launched
        functions.append(last[3])
        assert last[4] == y.data_ptr()
    aligned, apart = functions[:2]
    assert aligned != apart
    assert functions == [aligned, apart, aligned, aligned, apart]
    (launch,) = triton_launch._launches.values()
    assert len(launch._compiled) == 2


def _compiled() -> int:
    """How many kernels, also where two have the same code."""
    return len([*Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")])


@pytest.mark.parametrize("name", ["down", "over_tokens", "up"])
def test_few_kernels_are_compiled_for_ever_new_lengths(name: str) -> None:
    """Multiples of 16 and others alike; sums over rows are split into so many parts as these take."""
    x, y, h, a, b = _bf16(8192, 4096), _bf16(8192, N), _bf16(8192, R), torch.zeros(R, 4096), torch.zeros(N, R)
    calls: dict[str, Callable[[int], None]] = {
        "down": lambda m: triton_low_rank.lora_down(x[:m], [a], h[:m]),
        "over_tokens": lambda m: triton_low_rank.lora_over_tokens([h[:m]], x[:m, :1024], [a[:, :1024]]),
        "up": lambda m: triton_low_rank.lora_up(y[:m], [h[:m]], [b]),
    }
    for m in [*range(65, 8192, 397), 128, 1024, 8192]:
        calls[name](m)
    # parts: 2, 4, 8 and 16; their sum, whose elements are a multiple of 16 or not
    assert _compiled() <= (1 if name == "up" else 6)


@pytest.mark.parametrize("classes", [33, 64])
def test_one_kernel_for_chunks_of_logits_that_begin_anywhere(classes: int) -> None:
    z, target, losses = _bf16(19, classes), torch.zeros(19, dtype=torch.int64), torch.zeros(19)
    for first, last in ((0, 5), (5, 10), (10, 12), (12, 19)):
        chunk = z[first:last]
        triton_cross_entropy.cross_entropy(chunk, target[first:last], losses[first:last], chunk)
    assert _compiled() == 1 and len(launched) == 4


@pytest.mark.parametrize(("block", "blocks"), [(64, 32), (64, 11), (32, 64), (16, 5)])
def test_a_sum_is_split_so_that_every_multiprocessor_has_work(block: int, blocks: int) -> None:
    found = set()
    for m in range(65, 8193):
        programs = -(-m // block)
        splits = triton_low_rank._splits(programs, blocks, m * R, X)
        assert splits == 1 or (programs * splits <= 2 * 132 and splits <= blocks // 2)
        assert programs * splits >= 132 or splits * 2 > blocks // 2
        found.add(splits)
    assert found <= {1, 2, 4, 8, 16, 32}


def test_another_form_is_checked_anew() -> None:
    h, factor = torch.randn(40, 5), torch.randn(96, 5)
    triton_low_rank.lora_up(torch.randn(40, 96), [h], [factor])
    with pytest.raises(KernelError, match="does not fit y"):
        triton_low_rank.lora_up(torch.randn(40, 80), [h], [factor])
    with pytest.raises(KernelError, match="h must have contiguous rows"):
        triton_low_rank.lora_up(torch.randn(40, 96), [torch.randn(5, 40).t()], [factor])
    assert len(triton_launch._launches) == 1


def test_ever_new_forms_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MOST_LAUNCHES", 3)
    for m in range(1, 9):
        triton_low_rank.lora_up(torch.randn(m, 16), [torch.randn(m, 5)], [torch.randn(16, 5)])
        assert len(triton_launch._launches) <= 3
