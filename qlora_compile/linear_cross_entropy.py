"""`qlora::linear_cross_entropy`: output head and loss in one op, in chunks of rows, so that no [M, V] tensor is made.

    loss = Σ over rows with target ≠ ignore_index of  logsumexp(z) - z[target],   z = f(x Wᵀ + b)   (f: scale, soft cap)

Shapes: M rows (tokens), K input features, V vocabulary. Where a gradient is wanted it is computed in the same sweep
(the logits of a chunk become their own gradient in place, as in Liger's fused_linear_cross_entropy), of the *sum* of
the losses: the incoming gradient, with a mean's division and a loss scale in it, multiplies it in backward, so that
nothing is small enough to vanish in fp16. Softmax and loss are in fp32. On a CPU rows that do not count cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lora_group import as_rows, kernel_for, multiplies_natively, scratch
from .memory_plan import chunk_rows
from .ops import define_op

CHUNK_BYTES = {"cpu": 64 << 20, "other": 256 << 20}  # of fp32 logits at a time
BLOCK_BYTES = {
    "cpu": 2 << 20,
    "other": 256 << 20,
}  # of logits that softmax's passes share: on a CPU, what a cache holds
TILE_BYTES = 32 << 20  # of W in fp32 at a time, where products run in fp32
LEAST_ROWS = 128  # a chunk's product has to pay for reading W


@define_op
def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, scale: float, soft_cap: float
) -> Tensor:
    """x [..., K], W [V, K], b [V] or None, target int [...] -> the summed loss, fp32 [].

    z = scale (x Wᵀ + b), then soft_cap tanh(z / soft_cap) unless soft_cap is 0. Raises IndexError for a target that is
    no class.
    """
    return _Sweep(x, weight, bias, target, ignore_index, scale, soft_cap).run(False, False, False)[0]


@torch.library.register_fake("qlora::linear_cross_entropy")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, scale: float, soft_cap: float
) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


@define_op
def linear_cross_entropy_grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    keep_logits: bool = False,
) -> list[Tensor]:
    """[loss, dx like x (if need_dx), dW like W (if need_dw), db like b (if need_db)]: the gradients of the summed loss;
    with `keep_logits` then x Wᵀ + b [..., V] in x's dtype."""
    sweep = _Sweep(x, weight, bias, target, ignore_index, scale, soft_cap, keep_logits)
    return sweep.run(need_dx, need_dw, need_db)


@torch.library.register_fake("qlora::linear_cross_entropy_grads")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    scale: float,
    soft_cap: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    keep_logits: bool = False,
) -> list[Tensor]:
    wanted = ((x, need_dx), (weight, need_dw), (bias, need_db))
    loss = x.new_empty((), dtype=torch.float32)
    logits = [x.new_empty((*x.shape[:-1], weight.shape[0]))] if keep_logits else []
    return [loss, *(like.new_empty(like.shape) for like, need in wanted if need and like is not None), *logits]


@define_op
def linear_cross_entropy_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> list[Tensor]:
    """[the summed loss, fp32 []; x Wᵀ + b [..., V]]. Autograd sees the loss only: see `with_gradient` for the logits."""
    return _Sweep(x, weight, bias, target, ignore_index, 1.0, 0.0, True).run(False, False, False)


@torch.library.register_fake("qlora::linear_cross_entropy_logits")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> list[Tensor]:
    return [x.new_empty((), dtype=torch.float32), x.new_empty((*x.shape[:-1], weight.shape[0]))]


class _WithGradients(torch.autograd.Function):
    """Forward computes the gradients of what needs one; backward multiplies them by the incoming number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        *given, keep_logits = rest
        with torch._C._AutoDispatchBelowAutograd():
            needs = ctx.needs_input_grad[:3]
            loss, *grads = torch.ops.qlora.linear_cross_entropy_grads(x, weight, bias, *given, *needs, keep_logits)
        logits = grads.pop() if keep_logits else None
        ctx.save_for_backward(*grads)
        if logits is None:
            return loss
        ctx.mark_non_differentiable(logits)
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        # in fp32: the product of a bf16 gradient and 1 / tokens is rounded once
        grads = (
            (g := next(saved)).float().mul(grad).to(g.dtype) if need else None for need in ctx.needs_input_grad[:3]
        )
        return (*grads, None, None, None, None, None)


def _with_autograd(*args: Any) -> Tensor:
    """The op under autograd: what needs no gradient is not computed (evaluation, a frozen head)."""
    if _is_differentiated(args):
        return _WithGradients.apply(*args, False)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.qlora.linear_cross_entropy(*args)


def _with_autograd_and_logits(*args: Any) -> list[Tensor]:
    if _is_differentiated(args):
        return list(_WithGradients.apply(*args, 1.0, 0.0, True))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.qlora.linear_cross_entropy_logits(*args)


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args[:3])


_LIBRARY = torch.library.Library("qlora", "FRAGMENT")
_LIBRARY.impl("linear_cross_entropy", _with_autograd, "Autograd")
_LIBRARY.impl("linear_cross_entropy_logits", _with_autograd_and_logits, "Autograd")


class _WithGradient(torch.autograd.Function):
    """(hidden [..., K], logits [..., V], W [V, K]) -> the logits; backward: dhidden = dlogits W, if there is a dlogits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return logits.data  # the same memory, no view: it may be written

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if product_dtype(grad.dtype, grad.device.type) == grad.dtype:
            return grad @ weight, None, None
        return (grad.float() @ weight.float()).to(grad.dtype), None, None


def with_gradient(hidden: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """The logits that `linear_cross_entropy_logits` gave, as a function of what the head with the frozen `weight` read.

    Most training steps differentiate the loss alone. As an output of the compiled graph the logits would be given a
    gradient all the same, a tensor of zeros that is made, read and added; here backward runs only if one is asked for.
    """
    return _WithGradient.apply(hidden, logits, weight) if hidden.requires_grad else logits  # type: ignore[no-any-return]


@dataclass
class _Sweep:
    """One pass over the rows that count, chunk by chunk."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ignore_index: int
    scale: float
    soft_cap: float
    keep_logits: bool = False

    def run(self, need_dx: bool, need_dw: bool, need_db: bool) -> list[Tensor]:
        """[loss, dx, dW, db, logits], those that are needed."""
        x, target = as_rows(self.x, self.x.dtype), self.target.reshape(-1)
        counts = target != self.ignore_index
        need = need_dx or need_dw or need_db
        kernel = None if need_dw or need_db else self._kernel()
        logits = x.new_empty((len(x), len(self.weight))) if self.keep_logits else None
        # the rows that count; or all of them: on a GPU the host would wait to learn how many do, and those of kept logits
        # are computed anyway
        few = drops_rows(x.device.type) and (logits is None or kernel is not None)
        rows = counts.nonzero().squeeze(1) if few else None
        target = target.where(counts, 0) if rows is None else target.index_select(0, rows)
        self._check(target)
        losses = torch.empty(len(target), dtype=torch.float32, device=x.device)
        dx = torch.zeros_like(x) if need_dx else None
        dw = torch.zeros_like(self.weight, dtype=torch.float32) if need_dw else None
        db = torch.zeros_like(self.bias, dtype=torch.float32) if need_db and self.bias is not None else None
        if logits is not None and kernel is not None:
            torch.mm(x, self.weight.t(), out=logits)
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
            if dx is not None:
                part = z @ self.weight if kernel is not None else self._times_weight(z).to(dx.dtype)
                dx[chunk if which is None else which] = part
            if dw is not None:
                self._add_weight_gradient(dw, z, mine)
            if db is not None:
                db += z.sum(0)
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
            torch.mm(x[chunk] if which is None else x.index_select(0, which), self.weight.t(), out=z)
            which = None
        kernel(source, target, losses, z if need else None, which)
        return z

    def _kernel(self) -> Callable[..., None] | None:
        """The generated sweep over rows of logits, where the products are bf16 and the logits are their plain result."""
        device = self.x.device
        plain = is_plain(self.bias, self.scale, self.soft_cap, self.weight, device.type)
        return kernel_for("cross_entropy", device) if plain and self.x.dtype == self.weight.dtype else None

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
        for columns, weight in self._tiles():
            if x.dtype == torch.float32:
                torch.mm(x, weight.t(), out=z[:, columns])
            else:
                z[:, columns] = x @ weight.t()
        return z if self.bias is None else z.add_(self.bias)

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


def is_plain(bias: Any, scale: float, soft_cap: float, weight: Tensor, device: str) -> bool:
    """Whether the generated sweep covers it: bf16 products whose plain result the logits are."""
    bf16 = product_dtype(weight.dtype, device) == weight.dtype == torch.bfloat16
    return bias is None and scale == 1 and not soft_cap and bf16


def _of_device(by_device: dict[str, int], device: str) -> int:
    return by_device["cpu" if device == "cpu" else "other"]
