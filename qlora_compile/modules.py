"""Adapters on modules: `QLoRALinear`, adapted parameters, and the sites where adapters sit.

A linear module with a quantized weight gets the class `QLoRALinear` (a subclass of the class that it had), whose forward
is base + adapters in plain torch. A parameter that another module's own code uses (`F.linear(x, self.w)`) is read
through a property of its owner's new class, which gives the dense weight with the adapters' product added: slow and
correct in eager code, and matched back to base + adapters by the compiler.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import eager
from .class_edits import edited_class
from .computed_weight import computed
from .config import QLoRAConfig
from .errors import ModelStateError
from .sharding import stored_form


@dataclass
class AdapterInfo:
    """What is not a parameter of one adapted weight: numbers by adapter name, and how to compute."""

    site: str
    compute_dtype: torch.dtype
    fan_in_fan_out: bool
    dropout: float = 0.0
    rank: dict[str, int] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)
    scaling: dict[str, float] = field(default_factory=dict)
    # A and B as PiSSA, OLoRA or LoftQ made them from the weight, by adapter: what `save_adapter` takes away again.
    start: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def prefix_of(param_name: str) -> str:
    return "" if param_name == "weight" else f"{param_name}_"


class QLoRALinear(nn.Module):
    """Mixin over a linear module: y = x Wᵀ + b + Σ weight·scaling·(dropout(x) Aᵀ) Bᵀ, in the compute dtype.

    Parameters: `weight` (frozen, 4-bit unless `quantize=False`), `lora_A[name]` [r, in] and `lora_B[name]` [out, r].
    `lora_weight[name]` is a 0-dim tensor that `set_adapters` writes (one value for each row of the batch, with
    `adapter_ids`): changing it recompiles nothing.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_weight: dict[str, Tensor]
    lora_scaling: dict[str, float]
    lora_dtype: torch.dtype
    lora_dropout: float
    lora_fan_in_fan_out: bool

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            y = eager.forward(self, x)
            if y is not None:
                return y
        return self.plain_forward(x)

    def plain_forward(self, x: Tensor) -> Tensor:
        """The same in plain torch, op by op: what compilers trace."""
        # Dynamo traces this once a layer: no cast that changes nothing, no call of ParameterDict's own Python
        dtype = self.lora_dtype
        inputs = x if x.dtype == dtype or not x.is_floating_point() else x.to(dtype)  # integers: torch's own error
        weight = self.weight if self.weight.dtype == dtype else self.weight.to(dtype)
        bias = self.bias if self.bias is None or self.bias.dtype == dtype else self.bias.to(dtype)
        y = F.linear(inputs, weight.t() if self.lora_fan_in_fan_out else weight, bias)
        for name, a in self.lora_A._parameters.items():
            b, scaling, weight = self.lora_B._parameters[name], self.lora_scaling[name], self.lora_weight[name]
            dropped = F.dropout(inputs, self.lora_dropout, self.training) if self.lora_dropout else inputs
            h = F.linear(dropped, a if a.dtype == dtype else a.to(dtype))
            up = F.linear(h, b if b.dtype == dtype else b.to(dtype)) * scaling
            y = y + (up * weight if weight.dim() == 0 else (up * _by_row(weight, x)).to(dtype))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop(eager.NAME, None)  # it would keep the tensors where they were
        return moved(super()._apply(fn, recurse))


def _by_row(weight: Tensor, x: Tensor) -> Tensor:
    """One weight for each row of the batch, [rows] -> [rows, 1, ...] to multiply x's result with."""
    if weight.shape[0] != x.shape[0]:
        raise ModelStateError(
            f"adapter_ids chose adapters for {weight.shape[0]} rows, this batch has {x.shape[0]}: call set_adapters again."
        )
    return weight.view(-1, *[1] * (x.dim() - 1))


def moved(module: nn.Module) -> nn.Module:
    """The module, its adapters' weights moved to the device that `Module.to` moved its parameters to; still fp32."""
    for param_name in module.__dict__["_qlora_info"]:
        weights, stored = getattr(module, f"{prefix_of(param_name)}lora_weight"), module._parameters[param_name]
        weights |= {name: weight.to(stored.device) for name, weight in weights.items()}  # type: ignore[union-attr]
    return module


@functools.cache
def linear_class(cls: Any, param_name: str) -> type[nn.Module]:
    """The class of a module that is a linear by itself, with adapters."""
    body = {"__module__": __name__, "__doc__": QLoRALinear.__doc__}
    return edited_class("QLoRALinear", (QLoRALinear, cls), body, linear_class, cls, param_name)


def _adapted_weight(module: nn.Module, param_name: str) -> Tensor:
    """W + Σ weight·scaling·B A (transposed for an [in, out] weight): dense, in W's dtype, added in fp32.

    Eager code gets a ComputedWeight: what it would write there were lost.
    """
    weight = module._parameters[param_name]
    prefix = prefix_of(param_name)
    lora_a, lora_b = getattr(module, f"{prefix}lora_A"), getattr(module, f"{prefix}lora_B")
    scaling, weights = getattr(module, f"{prefix}lora_scaling"), getattr(module, f"{prefix}lora_weight")
    dense = torch.ops.qlora.densify(weight).float()
    for name in lora_a:
        delta = (lora_b[name].float() @ lora_a[name].float()) * scaling[name] * weights[name]
        dense = dense + (delta.t() if getattr(module, f"{prefix}lora_fan_in_fan_out") else delta)
    dense = dense.to(weight.dtype)  # type: ignore[union-attr]
    if torch.compiler.is_compiling() or eager.is_watched():
        return dense
    return computed(dense, module.__dict__["_qlora_info"][param_name].site)


@functools.cache
def parameter_class(cls: Any, param_name: str) -> type[nn.Module]:
    """The class of a module whose parameter other code than a linear's own uses: reading it gives W + adapters."""
    body = {
        param_name: property(lambda self: _adapted_weight(self, param_name)),
        "_apply": lambda self, fn, recurse=True: moved(cls._apply(self, fn, recurse)),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return edited_class(cls.__name__, (cls,), body, parameter_class, cls, param_name)


@dataclass(frozen=True)
class AdapterSite:
    """One adapted weight: its name, the module that owns it and the adapters on it."""

    name: str
    module: nn.Module
    param_name: str

    def _get(self, name: str) -> Any:
        return getattr(self.module, prefix_of(self.param_name) + name)

    @property
    def info(self) -> AdapterInfo:
        return self.module.__dict__["_qlora_info"][self.param_name]

    @property
    def weight(self) -> Tensor:
        """The stored weight itself (a QuantizedTensor unless `quantize=False`), without adapters."""
        weight = self.module._parameters[self.param_name]
        assert weight is not None
        return weight

    @property
    def adapters(self) -> list[str]:
        return list(self._get("lora_A").keys())

    @property
    def fan_in_fan_out(self) -> bool:
        return self.info.fan_in_fan_out

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[-1 if self.fan_in_fan_out else -2])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[-2 if self.fan_in_fan_out else -1])

    @property
    def experts(self) -> int | None:
        """E of a weight [E, out, in] ([E, in, out] if fan_in_fan_out), whose A is [E, r, in] and B [E, out, r]."""
        return int(self.weight.shape[0]) if self.weight.dim() == 3 else None

    def a(self, name: str = "default") -> nn.Parameter:
        return self._get("lora_A")[name]

    def b(self, name: str = "default") -> nn.Parameter:
        return self._get("lora_B")[name]

    def adapter_weight(self, name: str = "default") -> Tensor:
        """What multiplies the adapter's scaling: 0-dim, 1 unless `set_adapters` changed it; [rows] with adapter_ids."""
        return self._get("lora_weight")[name]

    def set_adapter_weight(self, name: str, value: Tensor) -> bool:
        """Write the value, in place where the shape stays; returns whether it did not, so that graphs are stale."""
        weights = self._get("lora_weight")
        old = weights[name]
        if old.shape == value.shape:
            old.copy_(value)
            return False
        weights[name] = value.to(old.device, old.dtype)
        return True

    def scaling(self, name: str = "default") -> float:
        return self.info.scaling[name]

    def rank(self, name: str = "default") -> int:
        return self.info.rank[name]

    def alpha(self, name: str = "default") -> float:
        return self.info.alpha[name]


def adapter_sites(model: nn.Module) -> dict[str, AdapterSite]:
    """Every adapted or quantized weight of the model by its name, in module order; a shared weight stands once.

    A name is relative to the module that was prepared or compiled; where several were (each layer by itself) and names
    coincide, to `model`.
    """
    found: list[tuple[str, str, nn.Module, str]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for param_name, info in module.__dict__.get("_qlora_info", {}).items():
            if id(module._parameters[param_name]) not in seen:
                seen.add(id(module._parameters[param_name]))
                full = path if param_name == "weight" else f"{path}.{param_name}".lstrip(".")
                found.append((info.site, full, module, param_name))
    count = Counter(site for site, _, _, _ in found)
    names = [site if count[site] == 1 else full for site, full, _, _ in found]
    return {name: AdapterSite(name, module, key) for name, (_, _, module, key) in zip(names, found)}


def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """All adapters' A and B (of one adapter, with `name`), in module order. Empty if the model was not prepared."""
    out = []
    for site in adapter_sites(model).values():
        for adapter in site.adapters if name is None else [name] if name in site.adapters else []:
            out += [site.a(adapter), site.b(adapter)]
    return out


@dataclass
class PreparedState:
    """What `prepare` or the backend leaves on the root module: the configuration, and the reports of its graphs.

    `complete`: by `prepare`, after which no graph adds an adapter that an optimizer made in between would not hold.
    """

    config: QLoRAConfig
    reports: list[Any] = field(default_factory=list)
    complete: bool = False

    def __reduce__(self) -> Any:
        return PreparedState, (self.config, [], self.complete)  # the graphs are those of the model that was compiled


def prepared_state(model: nn.Module) -> PreparedState | None:
    """The state on this module, or on the first of its submodules that has one (a model wrapped after `prepare`)."""
    for module in model.modules():
        state = module.__dict__.get("_qlora_state")
        if state is not None:
            return state
    return None


def prepared_config(model: nn.Module) -> QLoRAConfig | None:
    """The configuration that the model was prepared with, or None for a plain model."""
    state = prepared_state(model)
    return state.config if state else None


def is_quantized(weight: object) -> bool:
    """Whether it is stored in 4 bits, whole or (FSDP2) the rows of this rank."""
    return stored_form(weight) is not None
