"""What adapters trained in full (`modules_to_save`, `bias`), on a model in memory, which holds one of each parameter.

It counts for every adapter of the model, so the files of each hold it. A module notes in `_qlora_full` which of its
tensors `load_adapter` replaced, and for which adapter: PEFT's names reach further than `modules_to_save` of a
configuration here (`norm` names every `*_layernorm`), and biases are no modules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import AdapterMismatchError
from ..modules import AdapterSite, adapter_parameters, adapter_sites, is_quantized, prepared_config
from .fold_plan import first_few
from .formats.peft_files import PREFIX, wrapped_key
from .sharded import gathered

_NOTES = "_qlora_full"


@dataclass(frozen=True)
class FullPart:
    """What files say of it: `tensors` by their keys, the modules that hold them, and PEFT's option `bias`."""

    tensors: dict[str, torch.Tensor]
    modules: list[str]
    bias: str


def full_part(model: nn.Module, sites: Mapping[str, AdapterSite]) -> FullPart:
    """For the files of an adapter at `sites`.

    What lies in a layer that the adapter adapts has the name that PEFT's wrapper gives it, `.base_layer.bias`; another
    bias by itself its own; anything else is written by the whole module, which is what PEFT reads.
    """
    wrappers = Counter(
        n if site.experts is None else n.removesuffix(f".{site.param_name}") for n, site in sites.items()
    )
    modules = [name for name in modules_saved_in_full(model) if name not in wrappers]
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    tensors = {}
    for name in modules:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            if id(tensor) not in adapters:
                tensors[f"{PREFIX}{name}.{key}"] = gathered(tensor.detach())
    own = _own_tensors(model)
    alone = [key for key in loaded_in_full(model) if not key.startswith(tuple(f"{name}." for name in modules))]
    tensors |= {wrapped_key(key, wrappers): gathered(own[key].detach()) for key in alone}
    biased = {key.rpartition(".")[0] for key in alone if _is_bias(key)}
    return FullPart(tensors, modules, "none" if not biased else "lora_only" if biased <= set(sites) else "all")


def modules_saved_in_full(model: nn.Module) -> list[str]:
    """Full names of the modules that are trained in full, with those that share their parameters, sorted.

    PEFT copies such a module, which unties it from the other one; so both are written.
    """
    config = prepared_config(model)
    wanted = config.modules_to_save if config else ()
    modules = dict(model.named_modules(remove_duplicate=False))
    named = [n for n in modules if any(n == w or n.endswith(f".{w}") for w in wanted)]
    loaded = {key.rpartition(".")[0] for key in loaded_in_full(model) if not _is_bias(key)}
    named += sorted(n for n in loaded if not _inside(n, named))
    shared = {id(parameter) for n in named for parameter in modules[n].parameters()}
    tied = [n for n, m in modules.items() if any(id(p) in shared for p in m.parameters(recurse=False))]
    return sorted({*named, *(n for n in tied if not _inside(n, named))})


def loaded_in_full(model: nn.Module) -> dict[str, str]:
    """Name of each tensor that `load_adapter` replaced -> the adapter that it came with."""
    found = {}
    for path, module in model.named_modules():
        for leaf, adapter in module.__dict__.get(_NOTES, {}).items():
            found[f"{path}.{leaf}".lstrip(".")] = adapter
    return found


def misfits(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> list[str]:
    """What stops these from being copied into the model, one by one."""
    own = _own_tensors(model)
    return [problem for key, tensor in parameters.items() if (problem := _misfit(own, key, tensor))]


def check_can_hold(
    model: nn.Module, path: str | os.PathLike[str], adapter: str, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Raises AdapterMismatchError where the model cannot have these (which fit) and stay what its other adapters need.

    That is: a parameter with two names in the model and two values in the adapter, and one that another adapter had
    trained, or counts on, with another value. An adapter that adds nothing yet counts on none.
    """
    own = _own_tensors(model)
    changed = [key for key, tensor in parameters.items() if not _same(own[key], tensor)]
    for key in changed:
        for other, tensor in own.items():
            if tensor is own[key] and not (other in parameters and _same(parameters[other], parameters[key])):
                raise AdapterMismatchError(
                    f"The adapter {path} needs {key} to differ from {other}, and they are one parameter in the model: "
                    "give each its own before prepare(), or fold the adapter with export."
                )
    loaded = loaded_in_full(model)
    left = [key for key in loaded if key not in parameters]
    others = [*loaded.values(), *(n for n in _computing(model) if n != adapter)] if changed else []
    conflict = next((n for n in others if n != adapter), None)
    if left or conflict:
        what, who = (left, loaded[left[0]]) if left else (changed, conflict)
        raise AdapterMismatchError(
            f"The adapter {path} needs another {first_few(what)} than adapter {who!r}, and a model holds one: load it "
            "onto a model of its own, or fold it with export."
        )


def replace_in_full(model: nn.Module, adapter: str, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy these into the model and note those that are new to it."""
    own = _own_tensors(model)
    changed = [key for key, tensor in parameters.items() if not _same(own[key], tensor)]
    for key in changed:
        module, _, leaf = key.rpartition(".")
        model.get_submodule(module).__dict__.setdefault(_NOTES, {})[leaf] = adapter
        own[key].copy_(parameters[key])


def _computing(model: nn.Module) -> list[str]:
    """The adapters that add something: B is not what they started with (0, or what PiSSA and others took out)."""
    found: dict[str, bool] = {}
    for site in adapter_sites(model).values():
        for name in site.adapters:
            if not found.get(name):
                b, start = gathered(site.b(name).detach()), site.info.start.get(name)
                found[name] = bool((b if start is None else b != start[1].to(b.device, b.dtype)).any())
    return [name for name, adds in found.items() if adds]


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have."""
    own: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return own | dict(model.named_buffers(remove_duplicate=False))


def _misfit(own: Mapping[str, torch.Tensor], key: str, tensor: torch.Tensor) -> str | None:
    if key not in own:
        return f"the model has no parameter {key}"
    if is_quantized(own[key]):
        return f"{key} was trained in full but is 4-bit in the model: prepare it with modules_to_save"
    if own[key].shape != tensor.shape:
        return f"{key} is {list(own[key].shape)} in the model, {list(tensor.shape)} in the adapter"
    return None


def _same(own: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether copying would change nothing, as it is of the frozen head that PEFT saves beside an adapter of it."""
    return torch.equal(gathered(own.detach()), tensor.to(own.device, own.dtype))


def _is_bias(key: str) -> bool:
    """PEFT's rule for a parameter's own name (`gate_up_proj_bias` of experts is one)."""
    return "bias" in key.rpartition(".")[2]


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in modules)
