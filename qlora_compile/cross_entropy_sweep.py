"""Rows that an output head reads, their targets -> the summed cross-entropy and its gradients, chunk by chunk.

    z = x Wᵀ + b;  y = soft_cap tanh(scale z / soft_cap), or scale z without a cap;  loss = logsumexp(y) - y[target]
    dz = (softmax(y) - onehot(target)) scale (1 - (y / soft_cap)²);  dx = dz W;  dW = dzᵀ x;  db = dz summed over the rows

The logits of a chunk become their own gradient in place, as in Liger's fused_linear_cross_entropy. Where products run in
bf16 and the head is frozen, one generated kernel reads a chunk's logits and gives losses and gradient; elsewhere torch
does, in fp32. On a CPU rows that do not count cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .lora_group import as_rows, choose_kernel, multiplies_natively, scratch
from .memory_plan import chunk_rows
from .nf4 import DTYPES

CHUNK_BYTES = {"cpu": 64 << 20, "other": 256 << 20}  # of fp32 logits at a time
BLOCK_BYTES = {
    "cpu": 2 << 20,
    "other": 256 << 20,
}  # of logits that softmax's passes share: on a CPU, what a cache holds
TILE_BYTES = 32 << 20  # of W in fp32 at a time, where products run in fp32
SOFTMAX, FUSED, LIBRARY = "fused_softmax", "fused_fp32", "library_gemm"  # kernels: `runtime/kernels/loss_kernels.py`
LEAST_ROWS = 128  # a chunk's product has to pay for reading W


@dataclass
class Sweep:
    """One pass over the rows that count, chunk by chunk."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    scale: float
    soft_cap: float
    keep_logits: bool = False
    forced: str = ""
    _gemm: Callable[..., None] | None = field(default=None, init=False)

    def run(self, need_dx: bool, need_dw: bool, need_db: bool) -> list[Tensor]:
        """[loss, dx, dW, db, logits], those that are needed."""
        x, target = as_rows(self.x, self.x.dtype), self.target.reshape(-1)
        counts = target != self.ignore_index
        need = need_dx or need_dw or need_db
        kernel = self._choose(len(x), need_dw or need_db)
        logits = x.new_empty((len(x), len(self.weight))) if self.keep_logits else None
        # the rows that count; or all of them: on a GPU the host would wait to learn how many do, and those of kept logits
        # are computed anyway
        few = drops_rows(x.device.type) and (logits is None or kernel is not None)
        rows = counts.nonzero().squeeze(1) if few else None
        target = target.where(counts, 0) if rows is None else target.index_select(0, rows)
        self._check(target)
        losses = torch.empty(len(target), dtype=torch.float32, device=x.device)
        dx = (x.new_empty if rows is None else x.new_zeros)(x.shape) if need_dx else None
        dw = torch.zeros_like(self.weight, dtype=torch.float32) if need_dw else None
        db = torch.zeros_like(self.bias, dtype=torch.float32) if need_db and self.bias is not None else None
        if logits is not None and kernel is not None:
            self._head(x, logits)
        for chunk in self._chunks(len(target)):
            which = None if rows is None else rows[chunk]
            if kernel is not None:
                z = self._swept(kernel, x, chunk, which, target[chunk], losses[chunk], logits, need)
            else:
                mine = (x[chunk] if which is None else x.index_select(0, which)).to(self._product_dtype())
                z = self._logits(mine)
                if logits is not None:
                    logits[chunk] = z
                losses[chunk] = self._softmax(z, target[chunk], need)
            if rows is None and (dw is not None or db is not None):
                z.masked_fill_(~counts[chunk, None], 0)
            if dx is not None and kernel is not None and which is None:
                torch.mm(z, self.weight, out=dx[chunk])
            elif dx is not None:
                part = z @ self.weight if kernel is not None else self._times_weight(z).to(dx.dtype)
                dx[chunk if which is None else which] = part
            if dw is not None:
                self._add_weight_gradient(dw, z, mine)
            if db is not None:
                db += z.sum(0)
            del z  # before the next chunk's is made
        if rows is None:
            losses.masked_fill_(~counts, 0)
        if rows is None and dx is not None:
            dx.masked_fill_(~counts[:, None], 0)
        outs = [losses.sum()]
        outs += [dx.view(self.x.shape)] if dx is not None else []
        outs += [dw.to(self.weight.dtype)] if dw is not None else []
        outs += [db.to(self.bias.dtype)] if db is not None and self.bias is not None else []
        return outs + ([] if logits is None else [logits.view(*self.x.shape[:-1], len(self.weight))])

    def _swept(
        self,
        kernel: Callable[..., None],
        x: Tensor,
        chunk: slice,
        which: Tensor | None,
        target: Tensor,
        losses: Tensor,
        logits: Tensor | None,
        need: bool,
    ) -> Tensor:
        """The chunk's losses by the generated sweep; the gradient of its logits, if it is needed, in a reused buffer.
        `which`: its rows, where they are not the chunk's own; `logits`: those of all rows, which stay."""
        z = scratch("logits", (len(target), len(self.weight)), x, x.dtype)
        source = z
        if logits is not None:
            source = logits[chunk] if which is None else logits
        else:
            self._head(x[chunk] if which is None else x.index_select(0, which), z)
            which = None
        kernel(source, target, losses, z if need else None, which, self.scale, self.soft_cap)
        return z

    def _head(self, x: Tensor, out: Tensor) -> None:
        """x Wᵀ + b, rounded once, as the head itself gives it."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def _choose(self, rows: int, trained: bool) -> Callable[..., None] | None:
        """The generated sweep over rows of logits, where it is chosen; sets `_gemm` to the generated product, where that is.
        `trained`: the head gets a gradient."""
        sizes = problem(self.x, self.weight, self.bias, trained)
        choice = choose_kernel("linear_cross_entropy", forced=self.forced, rows=rows, **sizes)
        run = choice.candidate.run(self.x.device.type)
        self._gemm = run if choice.name == FUSED else None
        return run if choice.name == SOFTMAX else None

    def _check(self, target: Tensor) -> None:
        if len(target) == 0 or target.device.type != "cpu":  # a GPU reports it: a loss of NaN, or gather's assert
            return
        low, high = (int(t) for t in target.aminmax())
        bad = low if low < 0 else high
        if not 0 <= bad < len(self.weight):
            raise IndexError(f"Target {bad} is out of bounds: the output head has {len(self.weight)} classes.")

    def _chunks(self, rows: int) -> Iterator[slice]:
        """Equal chunks whose logits take CHUNK_BYTES or less, unless that would be fewer than LEAST_ROWS rows."""
        size = chunk_rows(rows, most_rows(len(self.weight), self.x.device.type))
        return (slice(first, min(first + size, rows)) for first in range(0, rows, size))

    def _product_dtype(self) -> torch.dtype:
        return product_dtype(self.x.dtype, self.x.device.type)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary rows, W's rows in the dtype of the products): all of W, or copies of a part in a reused buffer."""
        dtype = self._product_dtype()
        if dtype == self.weight.dtype:
            yield slice(0, len(self.weight)), self.weight
            return
        v, k = self.weight.shape
        size = tile_rows(v, k)
        for first in range(0, v, size):
            part = self.weight[first : first + size]
            yield slice(first, first + len(part)), scratch("head", (len(part), k), part, dtype).copy_(part)

    def _logits(self, x: Tensor) -> Tensor:
        """x [m, K] -> x Wᵀ + b, fp32 [m, V], in a reused buffer."""
        z = scratch("logits", (len(x), len(self.weight)), x, torch.float32)
        if self._gemm is not None:
            self._gemm([(x, self.weight.t(), 1.0)], z, self.bias)
            return z
        for columns, weight in self._tiles():
            if x.dtype == torch.float32:
                torch.mm(x, weight.t(), out=z[:, columns])
            else:  # with the bias in it, as the head itself rounds
                bias = None if self.bias is None else self.bias[columns].to(x.dtype)
                z[:, columns] = torch.nn.functional.linear(x, weight, bias)
        return z if self.bias is None or x.dtype != torch.float32 else z.add_(self.bias)

    def _softmax(self, z: Tensor, target: Tensor, need: bool) -> Tensor:
        """The losses of z's rows; z becomes d(sum of losses) / d(x Wᵀ + b) if needed, else it is spoilt."""
        losses = []
        size = block_rows(z.shape[1], z.device.type)
        for part, classes in zip(z.split(size), target.unsqueeze(1).split(size)):
            slope = None
            if self.scale != 1:
                part.mul_(self.scale)
            if self.soft_cap:
                part.div_(self.soft_cap).tanh_()
                slope = 1 - part * part if need else None
                part.mul_(self.soft_cap)
            part.sub_(part.amax(1, keepdim=True))
            picked = part.gather(1, classes)
            total = part.exp_().sum(1, keepdim=True)
            losses.append(total.log() - picked)
            if need:
                part.mul_(1 / total)
                part.scatter_add_(1, classes, part.new_full((), -1.0).expand_as(classes))
                if slope is not None:
                    part.mul_(slope)
                if self.scale != 1:
                    part.mul_(self.scale)
        return torch.cat(losses).squeeze(1)

    def _times_weight(self, dz: Tensor) -> Tensor:
        """dz [m, V] -> dz W, fp32 [m, K]."""
        if self._gemm is not None:
            out = dz.new_empty((len(dz), self.weight.shape[1]))
            self._gemm([(dz, self.weight, 1.0)], out)
            return out
        out = dz.new_zeros((len(dz), self.weight.shape[1]))
        for columns, weight in self._tiles():
            if weight.dtype == torch.float32:
                out.addmm_(dz[:, columns], weight)
            else:
                out += dz[:, columns].to(weight.dtype) @ weight
        return out

    def _add_weight_gradient(self, dw: Tensor, dz: Tensor, x: Tensor) -> None:
        if x.dtype == torch.float32:
            dw.addmm_(dz.t(), x)
        else:
            dw += dz.to(x.dtype).t() @ x


def drops_rows(device: str) -> bool:
    """Whether rows that do not count are left out of the products, rather than their gradient set to zero."""
    return device == "cpu"


def most_rows(classes: int, device: str) -> int:
    """Rows of a chunk at most, on this kind of device."""
    return max(LEAST_ROWS, _of_device(CHUNK_BYTES, device) // (4 * classes))


def block_rows(classes: int, device: str) -> int:
    """Rows that softmax's passes share."""
    return max(1, _of_device(BLOCK_BYTES, device) // (4 * classes))


def tile_rows(v: int, k: int) -> int:
    """Rows of W that are copied to fp32 at a time."""
    return min(v, max(1, TILE_BYTES // (4 * k)))


def product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """x's own dtype; fp32 on CPUs without instructions for half precision, where it is several times faster and rounds
    less."""
    return torch.float32 if device == "cpu" and not multiplies_natively(dtype) else dtype


def problem(x: Tensor, weight: Tensor, bias: Tensor | None, trained: bool) -> dict[str, Any]:
    """What the choice of the kernel depends on besides the rows, with the kernels that these tensors rule out and why.

    The generated softmax reads logits that are the plain result of a bf16 product, before scale and cap, and gives no
    gradient of the head; the generated product reads a head as it lies in memory.
    """
    barred = []
    if trained:
        barred.append((SOFTMAX, "the head trains"))
    elif any(t.dtype != weight.dtype for t in (x, bias) if t is not None):
        barred.append((SOFTMAX, "the head and what it reads differ in dtype"))
    head = [t for t in (weight, bias) if t is not None]
    if any(t.dtype not in DTYPES for t in (x, *head)) or not all(t.is_contiguous() for t in head):
        barred.append((FUSED, "for fp32, bf16 and fp16, and for a head whose rows are contiguous"))
    (v, k), device = weight.shape, x.device.type
    return {"n": (v,), "k": k, "dtype": weight.dtype, "device": device, "barred": tuple(barred)}


def _of_device(by_device: dict[str, int], device: str) -> int:
    return by_device["cpu" if device == "cpu" else "other"]
