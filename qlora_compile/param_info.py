"""One entry for each parameter of a model: who holds it, under which name, and whether it is a linear's weight."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import is_attention_weight
from .experts import expert_parameters
from .modules import AdapterInfo, AdapterSite
from .weight_reads import own_forward_is_linear


@dataclass(frozen=True)
class StateRef:
    """A tensor that the compiled graph takes as an extra input: what it is now, and how to fetch it at each call."""

    name: str
    example: Tensor
    get: Callable[[], Tensor]


@dataclass(frozen=True)
class ParamInfo:
    """One parameter of the model: its site name and every (module name, module, parameter name) that holds it."""

    name: str
    owners: tuple[tuple[str, nn.Module, str], ...]

    @property
    def param(self) -> Tensor:
        _, module, key = self.owners[0]
        value = module._parameters[key]
        assert value is not None
        return value

    @property
    def info(self) -> AdapterInfo | None:
        _, module, key = self.owners[0]
        return module.__dict__.get("_qlora_info", {}).get(key)

    @property
    def site(self) -> AdapterSite | None:
        _, module, key = self.owners[0]
        return AdapterSite(self.name, module, key) if self.info else None

    @property
    def is_experts(self) -> bool:
        """A parameter [E, ., .] of a module of fused experts that can become (or is) a QLoRAExperts."""
        return all(key in expert_parameters(module) for _, module, key in self.owners)


_ROUTER = re.compile(r"Router|TopKGating|MoE\w*Gate$")


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear whose weight is [in, out]."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_linear_module(module: nn.Module) -> bool:
    """A module whose own forward is a linear over its own `weight` (so that its class can be swapped)."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads this module's weight and never calls it
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or own_forward_is_linear(module)
    return is_conv1d(module) and type(module).forward.__qualname__ == "Conv1D.forward"


def is_linear_weight(module: nn.Module, key: str) -> bool:
    """A linear module's weight, or one of torch's attention modules, which are known to use it as one."""
    return is_attention_weight(module, key) or (key == "weight" and is_linear_module(module))


def site_name(module_name: str, module: nn.Module, key: str) -> str:
    """The name of the site that this parameter is or would be: the module's for a `weight`."""
    if key == "weight":
        return module_name.removesuffix(".base_layer")  # PEFT's wrapper has the layer's own name
    return f"{module_name}.{key}" if module_name else key


def router_names(root: nn.Module) -> frozenset[str]:
    """The names of all routers of mixtures of experts, as transformers calls their classes (`MixtralTopKRouter`,
    `JetMoeTopKGating`, `HunYuanMoEV1Gate`), and of the modules in them: noise in what they say sends tokens elsewhere."""
    routers = [(name, module) for name, module in root.named_modules() if _ROUTER.search(type(module).__name__)]
    return frozenset(inside for name, module in routers for inside, _ in module.named_modules(prefix=name))


def is_adapter(entry: ParamInfo) -> bool:
    """Whether it is an adapter's factor, ours or PEFT's."""
    return any(part.endswith(("lora_A", "lora_B")) for name, _, _ in entry.owners for part in name.split("."))
