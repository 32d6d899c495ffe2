"""Eager calls of any model with the kernels that its compiled graph would be given: dense products and attention.

On a CPU without bf16 instructions torch's bf16 products take many times as long as its fp32 ones. `widen_matmuls` and
`lower_attention` say so of a graph; this says so of what runs without one: an evaluation, a sample of the result.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import attention_ops, wide_ops
from .lora_group import choose_kernel

_PLAIN = (Tensor, nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)


class EagerKernels(TorchFunctionMode):
    """While it is on, linears, products and attention of plain CPU tensors run by the kernel that the table chooses."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        result = None if replacement is None else replacement(*args, **kwargs or {})
        return func(*args, **kwargs or {}) if result is None else result


def eager_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """EagerKernels where they may differ from torch's own, which is on CPUs."""
    return EagerKernels() if device.type == "cpu" else contextlib.nullcontext()


def _are_plain(*tensors: Any) -> bool:
    return all(type(t) in _PLAIN and t.device.type == "cpu" for t in tensors)


def _chosen(rows: int, n: int, k: int, dtype: torch.dtype, barred: tuple[Any, ...] = ()) -> str:
    """The kernel in fp32 that the table has for the product; empty where torch's is faster."""
    name = choose_kernel("dense_linear", rows=rows, n=(n,), k=k, dtype=dtype, device="cpu", barred=barred).name
    return name if name in (wide_ops.FUSED, wide_ops.LIBRARY) else ""


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not _are_plain(input, weight, *(() if bias is None else (bias,))) or weight.dim() != 2 or input.dim() == 0:
        return None
    if input.dtype not in _HALVES or input.dtype != weight.dtype or input.shape[-1] != weight.shape[1]:
        return None
    n, k = weight.shape
    name = _chosen(math.prod(input.shape[:-1]), n, k, input.dtype)
    return torch.ops.qlora.wide_linear(input, weight, bias, name) if name else None


def _matmul(*args: Any, **kwargs: Any) -> Tensor | None:
    if kwargs or len(args) != 2 or not _are_plain(*args):
        return None
    a, b = args
    if min(a.dim(), b.dim()) < 2 or a.dtype not in _HALVES or a.dtype != b.dtype:
        return None
    if not _chosen(math.prod(a.shape[:-1]), b.shape[-1], b.shape[-2], a.dtype, wide_ops.NO_BATCHES):
        return None
    return torch.ops.qlora.wide_matmul(a, b)  # type: ignore[no-any-return]


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: Any = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    if not _are_plain(query, key, value, *(() if attn_mask is None else (attn_mask,))):
        return None
    given = query, key, value, attn_mask, dropout_p, is_causal
    if attention_ops.why_not(*given, scale=scale, enable_gqa=enable_gqa) is not None:
        return None
    sizes = {"rows": query.shape[2], "n": (key.shape[2],), "k": query.shape[3]}
    kernel = choose_kernel("attention", **sizes, dtype=query.dtype, device="cpu").name
    if kernel == "library":
        return None
    numbers = bool(is_causal), 1 / math.sqrt(query.shape[3]) if scale is None else scale, kernel
    return torch.ops.qlora.attention(query, key, value, attn_mask, *numbers)[0]  # type: ignore[no-any-return]


_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.matmul, torch.bmm, operator.matmul, Tensor.matmul, Tensor.bmm, Tensor.__matmul__), _matmul),
}
