"""The op vocabulary, namespace `qlora::`: schema, plain-torch reference (the meaning), fake and autograd of each op.

Kernels register for these ops in `qlora_compile.runtime.kernels`; where there is none, the reference runs.

Shapes: M tokens, N output features, K input features, R the rank of one adapter. A *group* is one or more linears that
share their input x; every list argument has one entry per linear of the group (weights, biases) or one per adapter
(`lora_a`, `lora_b`, `scaling`, `alpha`, `seed`), adapters ordered by linear, `adapters[i]` of them for linear i.

    lora_linear:  y_i = x W_iᵀ + b_i + Σ_j alpha_j scaling_j dropout_j(x) A_jᵀ B_jᵀ

A weight is given by its 4-bit codes and scales (`quant_type` "nf4" or "fp4") or dense (`quant_type` "none"). Nothing
dense is saved for backward: codes and scales are, and the weight is dequantized again.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nf4


@functools.cache
def _kernels() -> Any:
    """The module of kernels, imported at the first use of an op."""
    return importlib.import_module("qlora_compile.runtime.kernels")


def _kernel(op: str, device: torch.device) -> Callable[..., Any] | None:
    """The kernel registered for this op and device, or None: then the reference runs."""
    return _kernels().find(op, device.type)


def _op(reference: Callable[..., Any]) -> Any:
    """Define `qlora::<name>` with this plain-torch body as its meaning on every device; returns the op.

    `torch.library.custom_op` does the same with two more Python layers around each call (60 of 200 us, measured on the
    forward of one small linear), which a model of 30 layers pays 240 times a step.
    """
    name = f"qlora::{reference.__name__}"
    schema = torch.library.infer_schema(reference, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", reference)
    return getattr(torch.ops.qlora, reference.__name__).default


# --- codec -----------------------------------------------------------------------------------------------------------


@_op
def quantize_4bit(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> list[Tensor]:
    """weight (any shape, fp32/bf16/fp16) -> [codes, absmax] or, double-quantized, [codes, absmax, scale, offset]."""
    kernel = _kernel("quantize_4bit", weight.device) or nf4.quantize_reference
    data = kernel(weight.contiguous().view(-1), quant_type, block_size, double_quant)
    return [part for part in data if part is not None]


@torch.library.register_fake("qlora::quantize_4bit")
def _(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> list[Tensor]:
    numel = weight.numel()
    blocks = -(-numel // block_size)
    codes = weight.new_empty(((numel + 1) // 2,), dtype=torch.uint8)
    if not double_quant:
        return [codes, weight.new_empty((blocks,), dtype=torch.float32)]
    scale = weight.new_empty((-(-blocks // nf4.SCALE_BLOCK_SIZE),), dtype=torch.float32)
    absmax = weight.new_empty((blocks,), dtype=torch.uint8)
    return [codes, absmax, scale, weight.new_empty((), dtype=torch.float32)]


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
    kernel = _kernel("dequantize_4bit", codes.device)
    if kernel is not None and out.dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernel(codes, absmax, absmax_scale, absmax_offset, out.numel(), quant_type, block_size, out)
        return out
    dense = nf4.dequantize_reference(
        codes, absmax, absmax_scale, absmax_offset, out.shape, quant_type, block_size, out.dtype
    )
    return out.copy_(dense)


@_op
def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """codes uint8 [ceil(n/2)] + scales -> dense `shape` in `dtype`: code_book[code] * absmax in fp32, one rounding."""
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    return dequantize_into(out, codes, absmax, absmax_scale, absmax_offset, quant_type, block_size)


@torch.library.register_fake("qlora::dequantize_4bit")
def _(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(tuple(shape), dtype=dtype)


@_op
def densify(weight: Tensor) -> Tensor:
    """A QuantizedTensor -> the dense tensor that it stands for (by its `__torch_dispatch__`); a dense one -> a copy."""
    return weight.clone()


@torch.library.register_fake("qlora::densify")
def _(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


# --- linear + LoRA ---------------------------------------------------------------------------------------------------

SMALL_M = 16  # up to here a linear reads the codes directly where there is a kernel for it
_SCRATCH = threading.local()


def _scratch(name: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A reused buffer per thread and device: a fresh one above 32 MB costs more in page faults than the dequantize."""
    buffers = _SCRATCH.__dict__.setdefault("buffers", {})
    key = (name, like.device, dtype)
    numel = shape[0] * shape[1]
    if key not in buffers or buffers[key].numel() < numel:
        buffers[key] = None  # freed before the larger one is made
        with torch.inference_mode(False):
            buffers[key] = torch.empty(numel, dtype=dtype, device=like.device)
    return buffers[key][:numel].view(shape)


def release_scratch() -> None:
    """Free this thread's reused buffers (each as large as the largest weight used so far)."""
    _SCRATCH.__dict__.pop("buffers", None)


class _Group:
    """One group's arguments with the arithmetic on them that forward and backward share. No tensor is copied here."""

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

    def dense_weight(self, index: int, k: int, out: Tensor | None = None) -> Tensor:
        """Linear `index`'s weight [N, K] in the compute dtype, dequantized into `out` or a reused buffer."""
        weight = self.weight[index]
        shape = (self.out_features[index], k)
        if self.quant_type == "none":
            return weight.to(self.dtype) if out is None else out.copy_(weight)
        if out is None:
            out = _scratch("weight", shape, weight, self.dtype)
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
        """x [M, K] W_iᵀ + bias [M, N]: straight from the codes for a few rows, else dequantize once + the library's GEMM.

        At SMALL_M rows the codes still won (benchmarks/results: 158 us against 44 us of dequantizing and 181 us of product
        for 1536 x 576 on two AVX-512 cores); more rows were not measured.
        """
        n, k = self.out_features[index], x.shape[1]
        if x.shape[0] <= SMALL_M and self.dtype == torch.bfloat16 and self.quant_type != "none":
            kernel = _kernel("linear_4bit_small", x.device) if k % self.block_size == 0 else None
            if kernel is not None:
                out = x.new_empty((x.shape[0], n))
                double = bool(self.absmax_scale)
                scales = (self.absmax_scale[index], self.absmax_offset[index]) if double else (None, None)
                kernel(x, self.weight[index], self.absmax[index], *scales, n, k, self.quant_type, self.block_size, out)
                return out if bias is None else out.add_(bias)
        return torch.nn.functional.linear(x, self.dense_weight(index, k), bias)

    @functools.cached_property
    def suits_kernels(self) -> bool:
        """Whether the kernels of the low-rank products cover this call: they read the parameters themselves (fp32 or
        bf16), for products in bf16 with nothing dropped."""
        factors = (*self.lora_a, *self.lora_b)
        if not factors or self.dropout or self.dtype != torch.bfloat16:
            return False
        return all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in factors)

    def low_rank_kernel(self, op: str, x: Tensor) -> Callable[..., Any] | None:
        """The kernel "lora_down", "lora_up" or "lora_backward", if there is one for this call."""
        return _kernel(op, x.device) if self.suits_kernels else None

    def a_cat(self) -> Tensor:
        """All adapters' A, one under the other: [sum R, K] in the compute dtype."""
        rows = [a.to(self.dtype) for a in self.lora_a]
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
        generator = torch.Generator(device=x.device)
        generator.manual_seed(int(self.seed[j].item()))
        keep = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return keep.mul_(1 / (1 - self.dropout))

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


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., K] -> [M, K] in `dtype` with contiguous rows (the gradient of a sum arrives with stride 0)."""
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()


def _split_ranks(group: _Group, h: Tensor) -> Sequence[Tensor]:
    return h.split_with_sizes(group.ranks(), dim=1) if len(group.lora_a) > 1 else [h]


def _add_low_rank(y: Tensor, h: Tensor, b: Tensor, factor: float | Tensor) -> None:
    """y += factor h bᵀ, accumulated into y by the product itself: no extra pass over y."""
    if isinstance(factor, Tensor):
        y.addmm_(h * factor.to(h.dtype), b.t())
    else:
        y.addmm_(h, b.t(), alpha=factor)


@_op
def lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor],
    absmax_scale: Sequence[Tensor],
    absmax_offset: Sequence[Tensor],
    bias: Sequence[Tensor],
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
) -> list[Tensor]:
    """x [..., K] -> [y_0 [..., N_0], ..., h [M, sum R]] in x's dtype; products run in `dtype`, `h` is kept for backward."""
    group = _Group(
        weight, absmax, absmax_scale, absmax_offset, lora_a, lora_b, scaling, alpha, adapters, seed, dropout,
        out_features, quant_type, block_size, dtype,
    )  # fmt: skip
    x2 = _rows(x, dtype)
    h = group.low_rank(x2)
    parts = _split_ranks(group, h)
    kernel = group.low_rank_kernel("lora_up", x2)
    outs = []
    for i, mine in enumerate(group.adapters_of()):
        y = group.product(i, x2, bias[i].to(dtype) if bias else None)
        for j in mine:
            if kernel is not None:
                kernel(parts[j], lora_b[j], group.factor(j), y)
            else:
                _add_low_rank(y, parts[j], lora_b[j].to(dtype), group.factor(j))
        # no tracked view: autograd lets nobody write into one of several views (nn.ReLU(inplace=True))
        outs.append(torch.ops.aten._unsafe_view(y.to(x.dtype), (*x.shape[:-1], out_features[i])))
    return [*outs, h]


@torch.library.register_fake("qlora::lora_linear")
def _(
    x: Tensor,
    weight: Sequence[Tensor],
    absmax: Sequence[Tensor],
    absmax_scale: Sequence[Tensor],
    absmax_offset: Sequence[Tensor],
    bias: Sequence[Tensor],
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
) -> list[Tensor]:
    tokens = math.prod(x.shape[:-1])  # not torch.Size(...).numel(), which would fix a symbolic size
    outs = [x.new_empty((*x.shape[:-1], n)) for n in out_features]
    return [*outs, x.new_empty((tokens, sum(a.shape[0] for a in lora_a)), dtype=dtype)]


@_op
def lora_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
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
    need_dx: bool,
    need_adapters: bool,
) -> list[Tensor]:
    """dy_i [..., N_i] -> [dx like x (if need_dx), dA_j like A_j..., dB_j like B_j... (if need_adapters)].

    With g_j = alpha_j scaling_j dy B_j [M, R]:  dA_j = g_jᵀ dropout_j(x),  dB_j = alpha_j scaling_j dyᵀ h_j, and dx is
    one product over the group and its adapters, [dy_0 ... g_0 ...] [W_0; ...; A_0; ...], accumulated in fp32.
    """
    group = _Group(
        weight, absmax, absmax_scale, absmax_offset, lora_a, lora_b, scaling, alpha, adapters, seed, dropout,
        out_features, quant_type, block_size, dtype,
    )  # fmt: skip
    x2 = _rows(x, dtype)
    dys = [_rows(g, dtype) for g in grads]
    h_parts = _split_ranks(group, h)
    kernel = group.low_rank_kernel("lora_backward", x2)
    if kernel is not None:
        low, da, db = _low_rank_grads(kernel, group, dys, x2, h_parts, need_adapters)
    else:
        low, da, db = _low_rank_grads_reference(group, dys, x2, h_parts, need_adapters)
    dx = [_grad_x(group, dys, low, x2).to(x.dtype).view(x.shape)] if need_dx else []
    return [*dx, *da, *db]


_LowRankGrads = tuple[list[Tensor], list[Tensor], list[Tensor]]  # g_j [M, R], dA_j, dB_j; the last two may be absent


def _low_rank_grads(
    kernel: Callable[..., Any], group: _Group, dys: list[Tensor], x: Tensor, h: Sequence[Tensor], need_adapters: bool
) -> _LowRankGrads:
    """One call of the kernel `lora_backward` for each adapter."""
    low = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in h]
    da = [torch.empty_like(a) for a in group.lora_a] if need_adapters else []
    db = [torch.empty_like(b) for b in group.lora_b] if need_adapters else []
    for i, mine in enumerate(group.adapters_of()):
        for j in mine:
            grads = (da[j], db[j]) if need_adapters else (None, None)
            kernel(dys[i], x, h[j], group.lora_b[j], group.factor(j), low[j], *grads)
    return low, da, db


def _low_rank_grads_reference(
    group: _Group, dys: list[Tensor], x: Tensor, h: Sequence[Tensor], need_adapters: bool
) -> _LowRankGrads:
    low, db = [], []
    for i, mine in enumerate(group.adapters_of()):
        for j in mine:
            factor = group.factor(j)
            low.append((dys[i] @ group.lora_b[j].to(group.dtype)).mul_(factor))
            if need_adapters:
                db.append((dys[i].t() @ h[j]).to(group.lora_b[j].dtype).mul_(factor))
    return low, _grad_a(group, x, low) if need_adapters else [], db


def _grad_a(group: _Group, x: Tensor, low: list[Tensor]) -> list[Tensor]:
    """g_jᵀ dropout_j(x) [R, K] for each adapter; one product for all of them where nothing drops."""
    if not low:
        return []
    if not group.dropout:
        left = low[0] if len(low) == 1 else torch.cat(low, dim=1)
        rows = (left.t() @ x).split(group.ranks())
        return [row.to(a.dtype, copy=True) for row, a in zip(rows, group.lora_a, strict=True)]
    return [(g.t() @ (x * group.mask(j, x))).to(group.lora_a[j].dtype) for j, g in enumerate(low)]


def _grad_x(group: _Group, dys: list[Tensor], low: list[Tensor], x: Tensor) -> Tensor:
    """[dy_0 ... g_0 ...] [W_0; ...; A_0; ...]: one product [M, sum N + sum R] x [sum N + sum R, K] for the group."""
    k = x.shape[-1]
    one_product = low if not group.dropout else []
    rows = sum(group.out_features) + sum(g.shape[1] for g in one_product)
    stacked = _scratch("stacked", (rows, k), x, group.dtype)
    first = 0
    for i, n in enumerate(group.out_features):
        group.dense_weight(i, k, out=stacked[first : first + n])
        first += n
    if one_product:
        for a, rows_of_a in zip(group.lora_a, stacked[first:].split(group.ranks()), strict=True):
            rows_of_a.copy_(a)
    left = [*dys, *one_product]
    dx = (torch.cat(left, dim=1) if len(left) > 1 else left[0]) @ stacked
    if group.dropout:
        for j, g in enumerate(low):
            dx += (g @ group.lora_a[j].to(group.dtype)) * group.mask(j, x)
    return dx


@torch.library.register_fake("qlora::lora_linear_backward")
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
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
    need_dx: bool,
    need_adapters: bool,
) -> list[Tensor]:
    dx = [x.new_empty(x.shape)] if need_dx else []
    if not need_adapters:
        return dx
    return [*dx, *(torch.empty_like(a) for a in lora_a), *(torch.empty_like(b) for b in lora_b)]


_ARGUMENTS = tuple(argument.name for argument in torch.ops.qlora.lora_linear.default._schema.arguments)
_TENSOR_LISTS = ("weight", "absmax", "absmax_scale", "absmax_offset", "lora_a", "lora_b", "scaling", "seed")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values = dict(zip(_ARGUMENTS, inputs, strict=True))
    flat = [values["x"], output[-1], *(t for name in _TENSOR_LISTS for t in values[name])]
    ctx.save_for_backward(*flat)
    ctx.lengths = [len(values[name]) for name in _TENSOR_LISTS]
    ctx.numbers = {name: values[name] for name in _ARGUMENTS if name != "x" and name not in (*_TENSOR_LISTS, "bias")}
    ctx.bias_dtypes = [bias.dtype for bias in values["bias"]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, h, *flat = ctx.saved_tensors
    lists: dict[str, list[Tensor]] = {}
    for name, length in zip(_TENSOR_LISTS, ctx.lengths, strict=True):
        lists[name], flat = flat[:length], flat[length:]
    numbers = ctx.numbers
    dys = [
        x.new_zeros((*x.shape[:-1], n)) if g is None else g
        for g, n in zip(grads[:-1], numbers["out_features"], strict=True)
    ]
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    need_dx, need_adapters = bool(needs["x"]), any(needs["lora_a"]) or any(needs["lora_b"])
    # None for each tensor; an empty list counts as a list of tensors, one of numbers as one value
    result: dict[str, Any] = {name: [None] * len(lists[name]) for name in _TENSOR_LISTS}
    result |= {name: [] for name in ("alpha", "adapters") if not numbers[name]}
    result["bias"] = [
        dy.reshape(-1, dy.shape[-1]).sum(0).to(dtype) if need else None
        for dy, need, dtype in zip(dys, needs["bias"], ctx.bias_dtypes)
    ]
    if need_dx or need_adapters:
        order = [*_ARGUMENTS[1:5], *_ARGUMENTS[6:]]  # all but x and bias, in the schema's order
        rest = [lists[name] if name in lists else numbers[name] for name in order]
        out = torch.ops.qlora.lora_linear_backward(dys, x, h, *rest, need_dx, need_adapters)
        result["x"] = out.pop(0) if need_dx else None
        if need_adapters:
            count = len(lists["lora_a"])
            result |= {"lora_a": out[:count], "lora_b": out[count:]}
    return tuple(result.get(name) for name in _ARGUMENTS)


torch.library.register_autograd("qlora::lora_linear", _backward, setup_context=_setup_context)
