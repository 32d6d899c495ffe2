"""What a piece of work cannot be faster than on this machine, by speeds that are measured in the same run.

Bytes at the speed of a read or a copy larger than the caches, operations at the speed of the library's bf16 product (fp32
where the CPU has no instructions for bf16, and that is the faster one).
What is far from both is bound by latency: launches, Python, a chain of small steps. What is faster than its bound shows
that the bound is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_compile.runtime.kernels import devices

NEAR = 0.5  # of the time: below it, neither bytes nor operations explain the time
BEATEN = 1.05  # of the time: above it, the bound is wrong by more than noise


@dataclass(frozen=True)
class Work:
    """What a problem cannot do without: bytes read, bytes written, operations (multiply and add: 2)."""

    read: int
    written: int
    operations: int = 0

    @staticmethod
    def of_linears(m: int, n: int, k: int, *, ranks: int = 0, block_size: int = 64) -> Work:
        """m rows through 4-bit weights [n, k] (double-quantized, bf16 products) with fp32 adapters of so many ranks."""
        numel = n * k
        packed = numel // 2 + numel // block_size + numel // block_size // 64  # codes, 8-bit scales, their fp32 scales
        read = packed + 2 * m * k + 4 * ranks * (n + k)
        return Work(read, 2 * m * n, 2 * m * (numel + ranks * (n + k)))


def product_speed(
    seconds: Callable[[Callable[[], object]], float], side: int = 2048, device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Operations a second of the library's product of two square matrices, in fp32 where the CPU multiplies no `dtype`."""
    if device == "cpu" and not devices.multiplies_natively(dtype):
        dtype = torch.float32
    square = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / seconds(lambda: square @ square)


def copy_seconds(seconds: Callable[[Callable[[], object]], float], source: Tensor, target: Tensor) -> float:
    """As many bytes read as written (integers): the library's copy or, on a GPU, an elementwise kernel if that is faster,
    as it is where the copy is left to the driver."""
    times = [seconds(lambda: target.copy_(source))]
    if source.device.type == "cuda":
        times.append(seconds(lambda: torch.bitwise_not(source, out=target)))
    return min(times)


@dataclass(frozen=True)
class Speeds:
    """Measured: bytes/s of a read and of a copy (read + written), operations/s of a product."""

    read: float
    copy: float
    operations: float

    @staticmethod
    def measure(
        seconds: Callable[[Callable[[], object]], float], device: str = "cpu", *, small: bool = False
    ) -> Speeds:
        """`seconds` times a call; 256 MB each way (2 GB on a GPU, whose caches are larger), and a large square product."""
        count = 1 << 16 if small else 1 << (25 if device == "cpu" else 28)
        source = torch.zeros(count, dtype=torch.int64, device=device)
        target, side = torch.empty_like(source), 64 if small else 2048 if device == "cpu" else 8192
        return Speeds(
            source.nbytes / seconds(source.sum),
            2 * source.nbytes / copy_seconds(seconds, source, target),
            product_speed(seconds, side, device),
        )

    def bounds(self, work: Work) -> tuple[float, float]:
        """Seconds by bytes, and by operations."""
        total = work.read + work.written
        return total / self.bytes_speed(work), work.operations / self.operations

    def bytes_speed(self, work: Work) -> float:
        return self.read if work.written < work.read / 16 else self.copy

    def bound(self, work: Work) -> tuple[float, str]:
        """(seconds, what takes them)."""
        by_bytes, by_operations = self.bounds(work)
        total, speed = work.read + work.written, self.bytes_speed(work)
        what = by_bytes, f"{total / 1e6:.1f} MB at {speed / 1e9:.0f} GB/s"
        return max(what, (by_operations, f"its operations at {self.operations / 1e9:.0f} GFLOP/s"))

    def explain(self, work: Work, seconds: float) -> dict[str, float | str]:
        """Both bounds in microseconds, the nearer one's share of the time, and which it is."""
        by_bytes, by_operations = self.bounds(work)
        share = max(by_bytes, by_operations) / seconds
        near = "bytes" if by_bytes >= by_operations else "operations"
        neither = f"launches, latency or {'decoding' if work.operations else 'arithmetic that is no product'}"
        bound_by = "nothing known" if share > BEATEN else near if share >= NEAR else neither
        return {"bytes_us": 1e6 * by_bytes, "operations_us": 1e6 * by_operations, "share": share, "bound_by": bound_by}


def explained(facts: dict[str, float | str]) -> str:
    """One row's `explain` in words."""
    times = f"bytes {facts['bytes_us']:,.1f} us, operations {facts['operations_us']:,.1f} us"
    share = float(facts["share"])
    if share > BEATEN:
        return f"{times}: beaten by a factor of {share:.2f}, so no bound"
    return f"{times}: {share:.2f} of the time, bound by {facts['bound_by']}"


def best_of(rounds: int) -> Callable[[Callable[[], object]], float]:
    """A timer for `Speeds.measure` on a CPU: the best of so many calls, after one that warms up."""

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(rounds + 1):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    return seconds
