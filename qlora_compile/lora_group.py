"""The arithmetic of `qlora::lora_linear` and its backward: one group's arguments, kernels where there are any, buffers.

Shapes as in `ops.py`: M tokens, N output features, K input features, R the rank of one adapter.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nf4

SCRATCH = threading.local()
ROWS = 2048  # rows at a time of what is drawn or copied to fp32 for a product; where masks are split, so one for all


@functools.cache
def _kernels() -> Any:
    """The module of kernels, imported at the first use of an op."""
    return importlib.import_module("qlora_compile.runtime.kernels")


def kernel_for(op: str, device: torch.device) -> Callable[..., Any] | None:
    """The kernel registered for this op and device, or None: then the reference runs."""
    return _kernels().find(op, device.type)


def choose_kernel(op: str, **sizes: Any) -> Any:
    """The `dispatch.Choice` for an op at these sizes, without measuring."""
    return _kernels().choose_kernel(op, **sizes)


def kernel_version() -> int:
    """Changes when a choice of `implementation` may change: after a measurement, or when a kernel was registered."""
    return _kernels().dispatch.version  # type: ignore[no-any-return]


def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in `dtype`: `qlora_compile.runtime.kernels.devices`."""
    return _kernels().devices.multiplies_natively(dtype)  # type: ignore[no-any-return]


def dequantize_into(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Tensor:
    """Write the weight's values into `out` (contiguous, any shape and floating dtype), in row-major order."""
    kernel = kernel_for("dequantize_4bit", codes.device)
    if kernel is not None and out.dtype in nf4.DTYPES:
        kernel(codes, absmax, absmax_scale, absmax_offset, out.numel(), quant_type, block_size, out)
        return out
    dense = nf4.dequantize_reference(
        codes, absmax, absmax_scale, absmax_offset, out.shape, quant_type, block_size, out.dtype
    )
    return out.copy_(dense)


def scratch(name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """On a CPU a reused buffer per thread: a fresh one above 32 MB costs more in page faults than the dequantize. Elsewhere
    a fresh one, which torch's allocator hands out again in the order of the stream, and which others can use meanwhile."""
    if like.device.type != "cpu":
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=like.device)
    found = SCRATCH.__dict__.setdefault("views", {}).get((name, shape, like.device, dtype))
    return _grown_scratch(name, shape, like, dtype) if found is None else found


def _grown_scratch(name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A new view of a buffer, which is made larger first if need be; then its old views go."""
    views = SCRATCH.views
    if len(views) > 1000:  # batches of ever new lengths
        views.clear()
    buffers = SCRATCH.__dict__.setdefault("buffers", {})
    key = name, like.device, dtype
    numel = shape[0] * shape[1]
    with torch.inference_mode(False):
        if key not in buffers or buffers[key].numel() < numel:
            for view in [view for view in views if (view[0], *view[2:]) == key]:
                del views[view]
            buffers.pop(key, None)  # freed before the larger one is made
            buffers[key] = torch.empty(numel, dtype=dtype, device=like.device)
        views[name, shape, like.device, dtype] = buffers[key][:numel].view(shape)
    return views[name, shape, like.device, dtype]  # type: ignore[no-any-return]


def release_scratch() -> None:
    """Free this thread's reused buffers (each as large as the largest weight used so far)."""
    SCRATCH.__dict__.clear()


def suit_kernels(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the low-rank kernels read these A and B: for products in bf16, contiguous and in fp32 or bf16."""
    known = all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in factors)
    return bool(factors) and dtype == torch.bfloat16 and known


class LoRAGroup:
    """One group's arguments with the arithmetic on them that forward and backward share. No tensor is copied here.

    `kept`: what a kernel made for these weights and adapters, for the next call with the same group. It may depend on
    their shapes, dtypes and strides, not on their values or on where they lie.
    """

    def __init__(
        self,
        weight: Sequence[Tensor],
        absmax: Sequence[Tensor],
        absmax_scale: Sequence[Tensor],
        absmax_offset: Sequence[Tensor],
        lora_a: Sequence[Tensor],
        lora_b: Sequence[Tensor],
        scaling: Sequence[Tensor],
        alpha: Sequence[float],
        adapters: Sequence[int],
        seed: Sequence[Tensor],
        dropout: float,
        out_features: Sequence[int],
        quant_type: str,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.absmax, self.absmax_scale = weight, absmax, absmax_scale
        self.absmax_offset, self.quant_type, self.block_size = absmax_offset, quant_type, block_size
        self.lora_a, self.lora_b, self.scaling, self.alpha = lora_a, lora_b, scaling, alpha
        self.adapters, self.seed, self.dropout = adapters, seed, dropout
        self.out_features, self.dtype = out_features, dtype
        self.kept: dict[Any, Any] = {}

    def arguments(self) -> tuple[Any, ...]:
        """As the ops take them, in their schemas' order."""
        scales = self.absmax, self.absmax_scale, self.absmax_offset
        adapters = self.lora_a, self.lora_b, self.scaling, self.alpha, self.adapters, self.seed, self.dropout
        return self.weight, *scales, *adapters, self.out_features, self.quant_type, self.block_size, self.dtype

    def dense_weight(self, index: int, k: int, out: Tensor | None = None) -> Tensor:
        """Linear `index`'s weight [N, K] in the compute dtype, dequantized into `out` or a reused buffer."""
        weight = self.weight[index]
        shape = (self.out_features[index], k)
        if self.quant_type == "none":
            return weight.to(self.dtype) if out is None else out.copy_(weight)
        if out is None:
            out = scratch("weight", shape, weight, self.dtype)
        double = bool(self.absmax_scale)
        return dequantize_into(
            out,
            weight,
            self.absmax[index],
            self.absmax_scale[index] if double else None,
            self.absmax_offset[index] if double else None,
            self.quant_type,
            self.block_size,
        )

    def product(self, index: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [M, K] W_iᵀ + bias [M, N]: dequantize into a reused buffer, then the library's GEMM in the compute dtype."""
        return torch.nn.functional.linear(x, self.dense_weight(index, x.shape[1]), bias)

    @functools.cached_property
    def suits_kernels(self) -> bool:
        """Whether the kernels of the low-rank products cover this call: they read the parameters themselves (fp32 or
        bf16), for products in bf16 with nothing dropped."""
        return not self.dropout and suit_kernels((*self.lora_a, *self.lora_b), self.dtype)

    def low_rank_kernel(self, op: str, x: Tensor) -> Callable[..., Any] | None:
        """The kernel "lora_down", "lora_up" or "lora_backward", if there is one for this call."""
        return kernel_for(op, x.device) if self.suits_kernels else None

    def a_cat(self, dtype: torch.dtype | None = None) -> Tensor:
        """All adapters' A, one under the other: [sum R, K] in the compute dtype, or in this one."""
        rows = [a.to(dtype or self.dtype) for a in self.lora_a]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.lora_a]

    def factor(self, j: int) -> float | Tensor:
        """alpha_j * scaling_j: a number where reading the tensor costs nothing (CPU), else a 0-dim fp32 tensor."""
        if not self.scaling:
            return self.alpha[j]
        scaling = self.scaling[j]
        return self.alpha[j] * (scaling.item() if scaling.device.type == "cpu" else scaling.float())

    def adapters_of(self) -> list[range]:
        """For each linear, the range of its adapters' indices."""
        out, first = [], 0
        for count in self.adapters:
            out.append(range(first, first + count))
            first += count
        return out

    def mask(self, j: int, x: Tensor) -> Tensor:
        """Adapter j's dropout mask, already divided by the keep probability, drawn again from its seed: like x."""
        kernel = kernel_for("dropout_mask", x.device)
        if kernel is not None:
            return kernel(self.seed[j], x, 1 - self.dropout)  # type: ignore[no-any-return]
        out, draw = torch.empty_like(x), self.mask_drawer(j, x)
        for rows in out.split(ROWS):
            draw(rows)
        return out

    def mask_drawer(self, j: int, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Fills the next ROWS rows of adapter j's mask at each call, for who needs no more at once. No kernel draws so."""
        generator, keep = torch.Generator(device=x.device), 1 - self.dropout
        generator.manual_seed(int(self.seed[j].item()))
        return lambda rows: rows.bernoulli_(keep, generator=generator).mul_(1 / keep)

    def low_rank(self, x: Tensor) -> Tensor:
        """x [M, K] -> dropout_j(x) A_jᵀ for all adapters side by side: [M, sum R]. One product where nothing drops."""
        if not self.lora_a:
            return x.new_empty((x.shape[0], 0))
        kernel = self.low_rank_kernel("lora_down", x)
        if kernel is not None:
            out = x.new_empty((x.shape[0], sum(self.ranks())))
            kernel(x, self.lora_a, out)
            return out
        if not self.dropout:
            return x @ self.a_cat().t()
        parts = [(x * self.mask(j, x)) @ a.to(self.dtype).t() for j, a in enumerate(self.lora_a)]
        return torch.cat(parts, dim=1)


Product = Callable[[int, Tensor, Tensor | None], Tensor]  # (linear's index, x [M, K], bias) -> [M, N]


def implementation(group: LoRAGroup, op: str, x: Tensor, forced: str) -> Callable[..., Any]:
    """The `run` of the kernel chosen for this op, group and number of rows: `qlora_compile.runtime.kernels.dispatch`."""
    sizes = x.shape[0], tuple(group.out_features), x.shape[1], sum(group.ranks())
    kind = group.dtype, group.quant_type, group.block_size, x.device.type, bool(group.dropout)
    return _kernels().lora_kernel(op, *sizes, *kind, forced)  # type: ignore[no-any-return]


def forward(
    group: LoRAGroup, x: Tensor, bias: Sequence[Tensor], product: Product | None = None
) -> tuple[list[Tensor], Tensor]:
    """x [M, K] -> ([y_i [M, N_i]], h [M, sum R]), products by `product` (else the library) in the compute dtype.

    The library adds its product to the low-rank one within the fp32 sum. The other way round, what a young adapter adds
    to a 16-bit y is often less than half a unit in its last place and would be lost.
    """
    h = group.low_rank(x)
    parts = split_ranks(group, h)
    kernel = group.low_rank_kernel("lora_up", x)
    outs = []
    for i, mine in enumerate(group.adapters_of()):
        low_rank_first = product is None and len(mine) > 0
        b = bias[i].to(group.dtype) if bias else None
        new = x.new_zeros if kernel is None else x.new_empty
        y = new((x.shape[0], group.out_features[i])) if low_rank_first else (product or group.product)(i, x, b)
        for j in mine:
            if kernel is not None:
                kernel(parts[j], group.lora_b[j], group.factor(j), y, not low_rank_first or j > mine.start)
            else:
                add_low_rank(y, parts[j], group.lora_b[j].to(group.dtype), group.factor(j))
        if low_rank_first:
            y.addmm_(x, group.dense_weight(i, x.shape[1]).t())
            y = y if b is None else y.add_(b)
        outs.append(y)
    return outs, h


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] -> [M, K] in `dtype` with contiguous rows."""
    return contiguous_rows(x.reshape(-1, x.shape[-1]).to(dtype))


def contiguous_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last stride is 1 (the gradient of a sum arrives with stride 0). `x.contiguous()` keeps any strides
    of what has no elements."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """y [M, N] -> [..., N] as x [..., K] has it, in x's dtype. No tracked view: autograd lets nobody write into one of
    several views (nn.ReLU(inplace=True)), nor into one that no_grad made."""
    y = y if y.dtype is x.dtype else y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]).data


def split_ranks(group: LoRAGroup, h: Tensor) -> Sequence[Tensor]:
    return h.split_with_sizes(group.ranks(), dim=1) if len(group.lora_a) > 1 else [h]


def add_low_rank(y: Tensor, h: Tensor, b: Tensor, factor: float | Tensor) -> None:
    """y += factor h bᵀ, accumulated into y by the product itself: no extra pass over y."""
    if isinstance(factor, Tensor):
        y.addmm_(h * factor.to(h.dtype), b.t())
    else:
        y.addmm_(h, b.t(), alpha=factor)
