"""How adapters get onto modules: containers and a new class for a weight's owners, then A and B of each adapter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import QLoRAConfig
from .errors import ConfigError, ModelStateError, NoAdapterError
from .modules import AdapterInfo, AdapterSite, adapter_sites, prefix_of, prepared_config


def check_adapter_name(name: object) -> None:
    """Raises ConfigError for a name under which torch's containers of parameters can hold no adapter."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ConfigError(
            f"An adapter cannot have the name {name!r}: take one that is not empty, without dots, and no method of "
            "torch.nn.ParameterDict."
        )


def attach(
    owners: list[tuple[nn.Module, str]], info: AdapterInfo, new_class: Callable[[type, str], type[nn.Module]]
) -> AdapterSite:
    """Give the owners of one weight (several if it is shared) the containers for adapters, and their new class."""
    first, param_name = owners[0]
    prefix = prefix_of(param_name)
    shared: dict[str, Any] = {"lora_A": nn.ParameterDict(), "lora_B": nn.ParameterDict()}
    shared |= {"lora_weight": {}, "lora_scaling": info.scaling, "lora_dtype": info.compute_dtype}
    shared |= {"lora_dropout": info.dropout, "lora_fan_in_fan_out": info.fan_in_fan_out}
    for module, name in owners:
        for key in shared:
            if hasattr(module, prefix + key):
                raise ModelStateError(
                    f"{info.site} cannot be adapted: {type(module).__name__} already has {prefix + key!r}."
                )
        for key, value in shared.items():
            setattr(module, prefix + key, value)
        module.__dict__.setdefault("_qlora_info", {})[name] = info
        module.__class__ = new_class(type(module), name)  # type: ignore[assignment]
    return AdapterSite(info.site, first, param_name)


def add_adapter_to_site(site: AdapterSite, name: str, rank: int, alpha: float, scaling: float, config: Any) -> None:
    """Register adapter `name` at the site: A drawn from (config.seed, site name), B zero (PEFT's initialization).

    `config.init_lora_weights`: True Kaiming-uniform A (bound 1/sqrt(in)), "gaussian" A ~ N(0, 1/r²), False B random too.
    """
    if name in site.adapters:
        raise ModelStateError(f"{site.name} already has an adapter {name!r}: choose another name.")
    generator = torch.Generator().manual_seed(_seed_of(config.seed, site.name, name))
    device, dtype = site.weight.device, config.adapter_dtype
    with torch.inference_mode(False):
        a, b = site.info.start.get(name) or _draw(rank, site, config.init_lora_weights, generator)
        site._get("lora_A")[name] = nn.Parameter(a.to(device, dtype, copy=True))
        site._get("lora_B")[name] = nn.Parameter(b.to(device, dtype, copy=True))
        site._get("lora_weight")[name] = torch.ones((), device=device)
    site.info.rank[name], site.info.alpha[name], site.info.scaling[name] = rank, float(alpha), float(scaling)


def _draw(rank: int, site: AdapterSite, init: bool | str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], of each expert, in fp32 on the CPU: every device starts from the same numbers."""
    k, experts = site.in_features, [] if site.experts is None else [site.experts]
    a, b = torch.empty(*experts, rank, k), torch.zeros(*experts, site.out_features, rank)
    if init == "gaussian":
        a.normal_(std=1 / max(rank, 1), generator=generator)
    else:
        bound = 1 / math.sqrt(k)
        a.uniform_(-bound, bound, generator=generator)
    if init is False:
        bound = 1 / math.sqrt(max(rank, 1))
        b.uniform_(-bound, bound, generator=generator)
    return a, b


def _seed_of(seed: int, site: str, adapter: str) -> int:
    """One seed per (seed, site, adapter), so that the order in which adapters are made does not matter."""
    digest = hashlib.sha256(f"{seed}\0{site}\0{adapter}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def add_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    scaling: Mapping[str, float],
) -> None:
    """Register a further adapter on a prepared model, at every site or at those that `rank` (a mapping) names.

    Raises NoAdapterError for a site that the model does not have, ModelStateError if the name is taken, ConfigError if
    none can have it.
    """
    check_adapter_name(name)
    sites, config = adapter_sites(model), prepared_config(model) or QLoRAConfig()
    wanted = rank if isinstance(rank, Mapping) else dict.fromkeys(sites, rank)
    missing = [site for site in wanted if site not in sites]
    if missing:
        raise NoAdapterError(
            f"The model has no adapted layer {missing[0]!r} ({len(missing)} of {len(wanted)} unknown)."
        )
    taken = [site for site in wanted if name in sites[site].adapters]
    if taken:
        raise ModelStateError(f"{taken[0]} already has an adapter {name!r}: choose another name.")
    for site_name, site_rank in wanted.items():
        site_alpha = alpha[site_name] if isinstance(alpha, Mapping) else alpha
        add_adapter_to_site(sites[site_name], name, site_rank, site_alpha, scaling[site_name], config)
