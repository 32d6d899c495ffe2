"""What a model's adapter says about itself in PEFT's `adapter_config.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..modules import AdapterSite, prepared_config
from .full_parameters import FullPart


def peft_config(
    model: nn.Module, name: str, sites: Mapping[str, AdapterSite], full: FullPart, doubled: set[str]
) -> dict[str, Any]:
    """LoraConfig's keys that describe what we train; PEFT takes its defaults for the others.

    At the sites of `doubled` the files hold twice the rank, and the alpha that leaves the scaling as it is.
    """
    config = prepared_config(model)
    ranks = {site_name: site.rank(name) * (2 if site_name in doubled else 1) for site_name, site in sites.items()}
    use_rslora, alphas = _alphas(name, sites)
    alphas = {n: alpha * (2 ** (0.5 if use_rslora else 1) if n in doubled else 1) for n, alpha in alphas.items()}
    rank, rank_pattern = default_and_pattern(ranks)
    alpha, alpha_pattern = default_and_pattern(alphas)
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    linears = {n: site for n, site in sites.items() if site.experts is None}
    experts = {n for n in sites if n not in linears}
    # peft refuses dropout beside target_parameters, which only training would use
    dropout = float(config.lora_dropout) if config and not experts else 0.0
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base or None,
        "bias": full.bias,
        "fan_in_fan_out": any(site.fan_in_fan_out for site in linears.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": full.modules or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "target_modules": _target_modules(model, linears),
        **({"target_parameters": _target_parameters(model, experts)} if experts else {}),
        "task_type": "CAUSAL_LM" if causal else None,
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def _alphas(name: str, sites: Mapping[str, AdapterSite]) -> tuple[bool, dict[str, float]]:
    """(use_rslora, alpha by site) such that PEFT computes the scalings that the model has."""
    for use_rslora in (False, True):
        if all(
            math.isclose(s.scaling(name), s.alpha(name) / (s.rank(name) ** (0.5 if use_rslora else 1)), rel_tol=1e-9)
            for s in sites.values()
        ):
            return use_rslora, {n: s.alpha(name) for n, s in sites.items()}
    return False, {n: s.scaling(name) * s.rank(name) for n, s in sites.items()}


def default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the rest by site; "^" pins a pattern to one site, and dots are dots."""
    plain = {n: int(v) if float(v).is_integer() else float(v) for n, v in values.items()}
    default = max(sorted(Counter(plain.values()).items()), key=lambda item: item[1])[0]
    return default, {f"^{n.replace('.', '[.]')}": v for n, v in sorted(plain.items()) if v != default}


def _target_modules(model: nn.Module, sites: Mapping[str, AdapterSite]) -> list[str]:
    """The last part of each site's name where only sites end in it, else the whole name, sorted."""
    last = {name: name.rpartition(".")[2] for name in sites}
    elsewhere = {n.rpartition(".")[2] for n, _ in model.named_modules() if n not in sites}
    return sorted({name if part in elsewhere else part for name, part in last.items()})


def _target_parameters(model: nn.Module, experts: set[str]) -> list[str]:
    """`experts.gate_up_proj` where every parameter that ends so has an adapter, else the whole name, sorted."""
    elsewhere = [n for n, _ in model.named_parameters() if n not in experts]
    short = {name: ".".join(name.split(".")[-2:]) for name in experts}
    return sorted({name if any(n.endswith(f".{s}") for n in elsewhere) else s for name, s in short.items()})
