"""The C++ attention as Python functions: out and log-sum-exp, and the gradients of queries, keys and values.

B batch, H query heads, KV key heads (each serves H / KV query heads), L queries, S keys, D size of a query, E of a value.
All have one dtype and any strides but 1 for the last dimension; sums are fp32, and no result depends on the number of
threads. There are two: `attention` multiplies in bf16, written for AVX-512 BF16 only (on other machines its makers return
None); `wide_attention` multiplies in fp32 on any machine what is fp32, bf16 or fp16, and rounds each result once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import KernelError
from . import cpp_build
from .cpu_common import DTYPES, isa_number

_MASKS = DTYPES | {torch.bool: 3}  # BOOL of attention_call.cpp.jinja


class _Heads(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64)
    )  # fmt: skip


class _Mask(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("query", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )  # fmt: skip


class _Call(ctypes.Structure):
    """`Call` of attention_call.cpp.jinja."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "G", "L", "S", "D", "E", "causal", "threads", "dtype")),
        ("scale", ctypes.c_double),
        *((name, _Heads) for name in ("q", "k", "v", "out")),
        ("logsumexp", ctypes.c_void_p),
        ("mask", _Mask),
        *((name, _Heads) for name in ("dout", "dq", "dk", "dv")),
    )


Run = Callable[..., None]  # (call, and for the wide kernel an instruction set's name)


def _bf16_kernel(name: str) -> Run | None:
    """The C function of the bf16 kernel, or None on a machine that cannot run it."""
    return cpp_build.bind(name, ctypes.POINTER(_Call), library="attention", needs="avx512_bf16")  # type: ignore[no-any-return]


def _wide_kernel(name: str) -> Run:
    function = cpp_build.bind(name, ctypes.POINTER(_Call), ctypes.c_int, library="wide_attention")
    return lambda call, isa="auto": function(call, isa_number(isa))


def _heads(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> _Heads:
    """A tensor's address and strides, once it is known to be a CPU tensor of that dtype and shape with contiguous rows."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu:
        raise KernelError(
            f"{name} must be a {str(dtype).removeprefix('torch.')} {[*shape]} CPU tensor, "
            f"got {tensor.dtype} {[*tensor.shape]} on {tensor.device}."
        )
    batch, head, row, last = tensor.stride()
    if last != 1 and shape[3] > 1:
        raise KernelError(f"{name} must have contiguous rows, its elements are {last} apart.")
    return _Heads(tensor.data_ptr(), batch, head, row)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor, logsumexp: Tensor
) -> _Call:
    (b, h, queries, d), (_, kv, keys, _), e = q.shape, k.shape, v.shape[-1]
    if kv == 0 or h % kv:
        raise KernelError(f"{h} query heads cannot share {kv} key heads equally.")
    if logsumexp.dtype != torch.float32 or logsumexp.shape != (b, h, queries) or not logsumexp.is_contiguous():
        raise KernelError(f"logsumexp must be contiguous fp32 {[b, h, queries]}, got {[*logsumexp.shape]}.")
    dtype = q.dtype
    call = _Call(b, h, h // kv, queries, keys, d, e, causal, torch.get_num_threads(), DTYPES[dtype], scale)
    call.q, call.k = _heads("q", q, dtype, b, h, queries, d), _heads("k", k, dtype, b, kv, keys, d)
    call.v, call.out = _heads("v", v, dtype, b, kv, keys, e), _heads("out", out, dtype, b, h, queries, e)
    call.logsumexp = logsumexp.data_ptr()
    if mask is not None:
        if mask.dtype not in _MASKS or not mask.is_cpu or mask.shape != (b, h, queries, keys):
            raise KernelError(
                f"mask must be a boolean or float CPU tensor {[b, h, queries, keys]}, got {mask.dtype} {[*mask.shape]}."
            )
        *strides, last = mask.stride()
        if last != 1 and keys > 1:
            raise KernelError(f"mask must have contiguous rows, its elements are {last} apart.")
        call.mask = _Mask(mask.data_ptr(), *strides, _MASKS[mask.dtype])
    return call


def _add_gradients(call: _Call, dout: Tensor, out: Tensor, *pairs: tuple[Tensor, Tensor]) -> _Call:
    """The backward's part of a call. pairs: (gradient, its tensor) for q, k and v."""
    call.dout = _heads("dout", dout, out.dtype, *out.shape)
    for name, (grad, tensor) in zip(("dq", "dk", "dv"), pairs, strict=True):
        setattr(call, name, _heads(name, grad, tensor.dtype, *tensor.shape))
    return call


def _check_dtype(q: Tensor, *dtypes: torch.dtype) -> None:
    if q.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise KernelError(f"q must be {names}, got {q.dtype}.")


def _forward(run: Run, dtypes: Sequence[torch.dtype]) -> Callable[..., None]:
    def attention_forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, out: Tensor, logsumexp: Tensor,
        *isa: str,
    ) -> None:  # fmt: skip
        """out [B, H, L, E] = softmax(scale q kᵀ + mask) v; logsumexp fp32 [B, H, L] of its scores.

        mask [B, H, L, S] (strides may be 0): boolean, True where a key is seen, or added. A query that sees no key gets
        zeros and minus infinity. causal: query i sees the keys up to i. `isa`: the wide kernel's, "auto" by default.
        """
        _check_dtype(q, *dtypes)
        run(_call(q, k, v, mask, causal, scale, out, logsumexp), *isa)

    return attention_forward


def _backward(run: Run, dtypes: Sequence[torch.dtype]) -> Callable[..., None]:
    def attention_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor | None, causal: bool,
        scale: float, dq: Tensor, dk: Tensor, dv: Tensor, *isa: str,
    ) -> None:  # fmt: skip
        """dq, dk and dv, each of its tensor's shape, for the forward's out and logsumexp."""
        _check_dtype(q, *dtypes)
        call = _call(q, k, v, mask, causal, scale, out, logsumexp)
        run(_add_gradients(call, dout, out, (dq, q), (dk, k), (dv, v)), *isa)

    return attention_backward


def make_attention_forward() -> Callable[..., None] | None:
    """Builds the library and returns `attention_forward`; None on a machine without AVX-512 BF16. Raises KernelError."""
    run = _bf16_kernel("attention_forward")
    return None if run is None else _forward(run, (torch.bfloat16,))


def make_attention_backward() -> Callable[..., None] | None:
    """Builds the library and returns `attention_backward`; None on a machine without AVX-512 BF16. Raises KernelError."""
    run = _bf16_kernel("attention_backward")
    return None if run is None else _backward(run, (torch.bfloat16,))


def make_wide_attention_forward() -> Callable[..., None]:
    """Builds the library and returns `attention_forward` with products in fp32, for all of DTYPES. Raises KernelError."""
    return _forward(_wide_kernel("wide_attention_forward"), (*DTYPES,))


def make_wide_attention_backward() -> Callable[..., None]:
    """Builds the library and returns `attention_backward` with products in fp32, for all of DTYPES. Raises KernelError."""
    return _backward(_wide_kernel("wide_attention_backward"), (*DTYPES,))
