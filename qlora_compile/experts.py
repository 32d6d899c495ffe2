"""Fused experts in 4 bits: `QLoRAExperts`, and which modules can become one.

transformers keeps the experts of a layer as parameters [E, out, in] or [E, in, out] of one module, whose forward comes
from its registry of experts' implementations (`transformers.integrations.moe`). What that registry tells an
implementation about a module (`has_gate`, `is_transposed`, `_apply_gate`, ...) is all that is read here, so every module
that follows it is covered, whatever its model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .class_edits import edited_class
from .errors import ModelStateError
from .modules import moved
from .tensor import QuantizedTensor

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts")


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's expert matrices [E, ., .], or () where it is no fused experts as transformers has them."""
    if not _has_interface(module) or runs_own_experts(module) or getattr(module, "_is_expert_parallel", False):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    weights = [module._parameters.get(name) for name in names]
    return names if all(weight is not None and weight.dim() == 3 for weight in weights) else ()


def _has_interface(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _INTERFACE)


def runs_own_experts(module: nn.Module) -> bool:
    """Whether it has transformers' interface, but a forward that is not the registry's, or an implementation there that is
    not transformers' own: ours would compute something else."""
    forward = type(module).forward
    if not _has_interface(module) or forward is QLoRAExperts.forward:
        return False
    known = getattr(forward, "__globals__", {})  # `__module__` is that of the forward which it wraps
    if known.get("__name__") != "transformers.integrations.moe":
        return True
    function = known["ALL_EXPERTS_FUNCTIONS"].get(getattr(module.config, "_experts_implementation", None))
    return function is not None and not getattr(function, "__module__", "").startswith("transformers.")


class QLoRAExperts(nn.Module):
    """Mixin over a module of fused experts: only experts that tokens were routed to are decoded and multiplied.

    Each matrix is a parameter [E, ., .] (4-bit unless `quantize=False`), its adapters are `<name>_lora_A` [E, r, in] and
    `<name>_lora_B` [E, out, r]. The activation, its gate and the biases are the module's own.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool = False  # transformers before 5.20 knows none
    is_transposed: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], the experts of each token [T, k] and their weights [T, k] -> [T, H]."""
        tokens, k = hidden_states.shape[0], top_k_index.shape[-1]
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(self.num_experts, device=experts.device, dtype=experts.dtype)
        offsets = torch.searchsorted(experts, numbers, right=True)
        source = order // k
        x = hidden_states[source]
        x = self._product("gate_up_proj" if self.has_gate else "up_proj", x, experts, offsets, source, tokens)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)  # type: ignore[operator]
        x = self._product("down_proj", x, experts, offsets, source, tokens)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)  # type: ignore[operator]
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return x[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, experts: Tensor, offsets: Tensor, source: Tensor, tokens: int) -> Tensor:
        """x [S, in], sorted by expert, times each row's expert's matrix, with its adapters and bias: [S, out].

        `source` [S] says which of the `tokens` each row was.
        """
        weight, transposed = getattr(self, name), self.is_transposed
        lora_a, lora_b = getattr(self, f"{name}_lora_A", {}), getattr(self, f"{name}_lora_B", {})
        scaling, weights = getattr(self, f"{name}_lora_scaling", {}), getattr(self, f"{name}_lora_weight", {})
        adapters = list(lora_a)
        if isinstance(weight, QuantizedTensor):
            stored, scales = weight.codes, weight.scales
            quant_type, block_size = weight.quant_type, weight.block_size
        else:
            stored, scales, quant_type, block_size = weight, [], "none", 0
        y = torch.ops.qlora.grouped_lora_linear(
            x,
            offsets,
            stored,
            scales,
            [lora_a[adapter] for adapter in adapters],
            [lora_b[adapter] for adapter in adapters],
            [_by_token(weights[adapter], source, tokens) for adapter in adapters],
            [scaling[adapter] for adapter in adapters],
            weight.shape[-1 if transposed else -2],
            transposed,
            quant_type,
            block_size,
            getattr(self, f"{name}_lora_dtype", weight.dtype),
        )[0]
        return y + getattr(self, f"{name}_bias")[experts] if self.has_bias else y

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return moved(super()._apply(fn, recurse))


def _by_token(weight: Tensor, source: Tensor, tokens: int) -> Tensor:
    """An adapter's weight for each row of the batch (`adapter_ids`), [rows] -> [S]; one for all stays as it is.

    Experts see a batch's tokens row after row, as many of each.
    """
    if weight.dim() == 0:
        return weight
    rows = weight.shape[0]
    if tokens % rows:
        raise ModelStateError(
            f"adapter_ids chose adapters for {rows} rows, this batch has {tokens} tokens: call set_adapters again."
        )
    return weight[source // (tokens // rows)]


@functools.cache
def experts_class(cls: Any, param_name: str) -> type[nn.Module]:
    """The class of a module of fused experts, with adapters on one or more of its matrices."""
    if issubclass(cls, QLoRAExperts):
        return cls
    body = {"__module__": __name__, "__doc__": QLoRAExperts.__doc__}
    return edited_class("QLoRAExperts", (QLoRAExperts, cls), body, experts_class, cls, param_name)
