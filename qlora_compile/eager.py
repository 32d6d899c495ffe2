"""Calls of a `QLoRALinear` outside of any compiler, without the dispatcher: one kernel for product, adapters and bias.

The plain forward costs some ten dispatched ops a call, which for a few rows is many times the work in them. Here a
module's arguments are put together once (`Prepared`); a call finds out whether they still hold, takes the kernel that
the table chooses for its rows, and runs it. What other code may want to see op by op keeps the plain forward: compilers
and tracers, dispatch and function modes (fake tensors, counters), functorch, forward-mode gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .eager_kernels import EagerKernels
from .lora_group import LoRAGroup, as_rows, from_rows, implementation, kernel_version
from .tensor import QuantizedTensor

NAME = "_qlora_eager"  # under it a module keeps what was prepared; no attribute of torch's


class Prepared:
    """A module's arguments for the kernels (`group`; None: the plain forward runs), and for which state of it they hold."""

    __slots__ = ("bias", "group", "k", "runs", "state", "version", "weight")

    def __init__(
        self, state: tuple[Any, ...], weight: Tensor, k: int = 0, group: LoRAGroup | None = None, bias: Any = ()
    ) -> None:
        self.state, self.weight, self.k, self.group, self.bias = state, weight, k, group, bias
        self.runs: dict[tuple[str, int], Callable[..., Any]] = {}
        self.version = -1

    def __reduce__(self) -> Any:
        return _nothing, ()  # neither copied nor saved with the module

    def run(self, op: str, x: Tensor) -> Callable[..., Any]:
        """The kernel for x's rows, asked of the table once."""
        if self.version != kernel_version() or len(self.runs) > 100:
            self.runs, self.version = {}, kernel_version()
        key = op, x.shape[0]
        found = self.runs.get(key)
        if found is None:
            assert self.group is not None
            found = self.runs[key] = implementation(self.group, op, x, "")
        return found


def _nothing() -> None:
    return None


def forward(module: Any, x: Tensor) -> Tensor | None:
    """The module's y for x, or None where its plain forward has to run."""
    if type(x) is not Tensor or is_watched():
        return None
    state = _state(module)
    if state is None:
        return None
    prepared = module.__dict__.get(NAME)
    if prepared is None or prepared.state != state:
        prepared = module.__dict__[NAME] = _prepare(module, state)
    group = prepared.group
    if group is None or x.device != prepared.weight.device or x.dim() == 0 or x.shape[-1] != prepared.k:
        return None
    if not x.is_floating_point():
        return None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != group.dtype:
        return None
    factors = (*group.lora_a, *group.lora_b)
    with _no_autocast(kind):
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in factors)):
            return _LoRALinear.apply(x, module, prepared, *factors)  # type: ignore[no-any-return]
        return _product(prepared, x)[0]


def _no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Kernels are given the dtypes that they shall compute in."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


_NOTHING = contextlib.nullcontext()


def _product(prepared: Prepared, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y [..., N] in x's dtype, h)."""
    assert prepared.group is not None
    rows = as_rows(x, prepared.group.dtype)
    (y,), h = prepared.run("lora_linear", rows)(prepared.group, rows, prepared.bias)
    return from_rows(y, x), h


def is_watched() -> bool:
    """Whether somebody wants to see the ops one by one."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_known_modes())
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _only_known_modes() -> bool:
    return all(type(mode) in (DeviceContext, EagerKernels) for mode in _get_current_function_mode_stack())


def _state(module: Any) -> tuple[Any, ...] | None:
    """All that `Prepared` was made from: which tensors, of which form, and numbers; None if it cannot be used."""
    parameters, modules = module._parameters, module._modules
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not QuantizedTensor or (module.training and module.lora_dropout):
        return None
    weights, scaling = module.lora_weight, module.lora_scaling
    lora_a, lora_b = modules["lora_A"]._parameters, modules["lora_B"]._parameters
    state: list[Any] = [id(weight), id(weight.codes), module.lora_dtype]
    if bias is not None:
        if bias.requires_grad:
            return None
        state += (id(bias), bias.dtype)
    for name, a in lora_a.items():
        b = lora_b[name]
        state += (id(a), a.dtype, a.shape, a.is_contiguous(), id(b), b.dtype, b.shape, b.is_contiguous())
        state += (id(weights[name]), scaling[name])
    return tuple(state)


def _prepare(module: Any, state: tuple[Any, ...]) -> Prepared:
    """No group for a weight that lies the other way round, adapters weighted by row, and tensors of other classes."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    lora_a, lora_b = (module._modules[name]._parameters for name in ("lora_A", "lora_B"))
    names = list(lora_a)
    a, b, weights = ([of[name] for name in names] for of in (lora_a, lora_b, module.lora_weight))
    biases = [] if bias is None else [bias]
    # the state names tensors by id: `kept` keeps them alive, so that nothing else gets the id
    nothing = Prepared(state, weight, bias=[*biases, *a, *b, *weights])
    if weight.dim() != 2 or weight.transposed != module.lora_fan_in_fan_out or any(w.dim() for w in weights):
        return nothing
    if any(type(t) not in (Tensor, nn.Parameter) for t in (*a, *b, *weights, *biases)):
        return nothing
    if weight.device.type not in ("cpu", "cuda") or any(t.device != weight.device for t in (*a, *b, *weights, *biases)):
        return nothing
    n, k = weight.layout_4bit.inner_shape
    double = weight.double_quant
    group = LoRAGroup(
        [weight.codes], [weight.absmax], [weight.absmax_scale] if double else [],
        [weight.absmax_offset] if double else [], a, b, weights, [module.lora_scaling[name] for name in names],
        [len(names)], [], 0.0, [n], weight.quant_type, weight.block_size, module.lora_dtype,
    )  # fmt: skip
    return Prepared(state, weight, k, group, biases)


class _LoRALinear(torch.autograd.Function):
    """(x, module, prepared, *A, *B) -> y. Saved are x and h = x Aᵀ; codes and scales are the module's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, prepared: Prepared, *factors: Tensor) -> Tensor:
        y, h = _product(prepared, x)
        ctx.module, ctx.prepared = module, prepared
        ctx.save_for_backward(x, h, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, h, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: by ops that can be differentiated once more
            return _differentiable(ctx.module, x, factors, dy, needs)
        group, need_adapters = ctx.prepared.group, any(needs[3:])
        if torch.compiler.is_compiling() or type(dy) is not Tensor or is_watched():  # compiled autograd, fake tensors
            grads = torch.ops.qlora.lora_linear_backward([dy], x, h, *group.arguments(), needs[0], need_adapters, "")
            dx = grads.pop(0) if needs[0] else None
            return dx, None, None, *(grads or [None] * len(factors))
        rows, dys = as_rows(x, group.dtype), [as_rows(dy, group.dtype)]
        with _no_autocast(x.device.type):
            dx, da, db = ctx.prepared.run("lora_linear_backward", rows)(group, dys, rows, h, needs[0], need_adapters)
        dx = None if dx is None else dx.to(x.dtype).view(x.shape)
        return dx, None, None, *(da + db if need_adapters else [None] * len(factors))


def _differentiable(module: Any, x: Tensor, factors: list[Tensor], dy: Tensor, needs: Any) -> tuple[Any, ...]:
    """The same gradients from the plain forward, as part of the graph."""
    inputs = [x, *factors]
    wanted = [t for t, need in zip(inputs, (needs[0], *needs[3:]), strict=True) if need]
    grads = iter(torch.autograd.grad(module.plain_forward(x), wanted, dy, create_graph=True))
    dx, *rest = (next(grads) if need else None for need in (needs[0], *needs[3:]))
    return dx, None, None, *rest
