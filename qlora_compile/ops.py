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

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import nf4
from .derivatives import once_differentiable
from .lora_group import (
    LoRAGroup,
    as_rows,
    dequantize_into,
    from_rows,
    implementation,
    kernel_for,
)


def define_op(reference: Callable[..., Any]) -> Any:
    """Define `qlora::<name>` with this plain-torch body as its meaning on every device; returns the op.

    Its arguments say what it computes in: under autocast it runs as without.

    `torch.library.custom_op` does the same with two more Python layers around each call (60 of 200 us, measured on the
    forward of one small linear), which a model of 30 layers pays 240 times a step.
    """
    name = f"qlora::{reference.__name__}"
    schema = torch.library.infer_schema(reference, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return reference(*args)
        with torch._C._DisableAutocast():
            return reference(*args)

    torch.library.impl(name, "default", run)
    return getattr(torch.ops.qlora, reference.__name__).default


# --- codec -----------------------------------------------------------------------------------------------------------


@define_op
def quantize_4bit(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> list[Tensor]:
    """weight (any shape, fp32/bf16/fp16) -> [codes, absmax] or, double-quantized, [codes, absmax, scale, offset]."""
    kernel = kernel_for("quantize_4bit", weight.device) or nf4.quantize_reference
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


@define_op
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


@define_op
def densify(weight: Tensor) -> Tensor:
    """A QuantizedTensor -> the dense tensor that it stands for (by its `__torch_dispatch__`); a dense one -> a copy."""
    return weight.clone()


@torch.library.register_fake("qlora::densify")
def _(weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


# --- linear + LoRA ---------------------------------------------------------------------------------------------------


@define_op
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
    forward_kernel: str = "",
    backward_kernel: str = "",
) -> list[Tensor]:
    """x [..., K] -> [y_0 [..., N_0], ..., h [M, sum R]] in x's dtype; products run in `dtype`, `h` is kept for backward.

    `forward_kernel` and `backward_kernel` name the kernels to use; "" lets `runtime.kernels.dispatch` choose.
    """
    group = LoRAGroup(
        weight, absmax, absmax_scale, absmax_offset, lora_a, lora_b, scaling, alpha, adapters, seed, dropout,
        out_features, quant_type, block_size, dtype,
    )  # fmt: skip
    x2 = as_rows(x, dtype)
    ys, h = implementation(group, "lora_linear", x2, forward_kernel)(group, x2, bias)
    return [*[from_rows(y, x) for y in ys], h]


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
    forward_kernel: str = "",
    backward_kernel: str = "",
) -> list[Tensor]:
    tokens = math.prod(x.shape[:-1])  # not torch.Size(...).numel(), which would fix a symbolic size
    outs = [x.new_empty((*x.shape[:-1], n)) for n in out_features]
    return [*outs, x.new_empty((tokens, sum(a.shape[0] for a in lora_a)), dtype=dtype)]


@define_op
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
    backward_kernel: str = "",
) -> list[Tensor]:
    """dy_i [..., N_i] -> [dx like x (if need_dx), dA_j like A_j..., dB_j like B_j... (if need_adapters)].

    With g_j = alpha_j scaling_j dy B_j [M, R]:  dA_j = g_jᵀ dropout_j(x),  dB_j = alpha_j scaling_j dyᵀ h_j, and dx is
    one product over the group and its adapters, [dy_0 ... g_0 ...] [W_0; ...; A_0; ...], accumulated in fp32.
    """
    group = LoRAGroup(
        weight, absmax, absmax_scale, absmax_offset, lora_a, lora_b, scaling, alpha, adapters, seed, dropout,
        out_features, quant_type, block_size, dtype,
    )  # fmt: skip
    x2 = as_rows(x, dtype)
    dys = [as_rows(g, dtype) for g in grads]
    run = implementation(group, "lora_linear_backward", x2, backward_kernel)
    dx, da, db = run(group, dys, x2, h, need_dx, need_adapters)
    return [*([] if dx is None else [dx.to(x.dtype).view(x.shape)]), *da, *db]


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
    backward_kernel: str = "",
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


@once_differentiable("qlora::lora_linear")
def _backward(ctx: Any, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, h, *flat = saved
    lists: dict[str, list[Tensor]] = {}
    for name, length in zip(_TENSOR_LISTS, ctx.lengths, strict=True):
        lists[name], flat = flat[:length], flat[length:]
    numbers = ctx.numbers
    dys = [
        x.new_zeros((*x.shape[:-1], n)) if g is None else g
        for g, n in zip(grads[:-1], numbers["out_features"], strict=True)
    ]
    given = _ARGUMENTS[: len(ctx.needs_input_grad)]  # arguments left at their defaults are not counted here
    needs = dict(zip(given, ctx.needs_input_grad, strict=True))
    need_dx, need_adapters = bool(needs["x"]), any(needs["lora_a"]) or any(needs["lora_b"])
    # None for each tensor; an empty list counts as a list of tensors, one of numbers as one value
    result: dict[str, Any] = {name: [None] * len(lists[name]) for name in _TENSOR_LISTS}
    result |= {name: [] for name in ("alpha", "adapters") if not numbers[name]}
    result["bias"] = [
        dy.reshape(-1, dy.shape[-1]).sum(0).to(dtype) if need else None
        for dy, need, dtype in zip(dys, needs["bias"], ctx.bias_dtypes)
    ]
    if need_dx or need_adapters:
        order = [*_ARGUMENTS[1:5], *_ARGUMENTS[6:-2]]  # all but x, bias and the kernels' names, in the schema's order
        rest = [lists[name] if name in lists else numbers[name] for name in order]
        rest += [need_dx, need_adapters, numbers["backward_kernel"]]
        out = torch.ops.qlora.lora_linear_backward(dys, x, h, *rest)
        result["x"] = out.pop(0) if need_dx else None
        if need_adapters:
            count = len(lists["lora_a"])
            result |= {"lora_a": out[:count], "lora_b": out[count:]}
    return tuple(result.get(name) for name in given)


torch.library.register_autograd("qlora::lora_linear", _backward, setup_context=_setup_context)
