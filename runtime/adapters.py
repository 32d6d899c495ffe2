"""Adapters of a model in memory <-> PEFT files, and how strongly each adapter counts."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..adapter_edits import add_adapter, check_adapter_name
from ..errors import AdapterMismatchError, ConfigError, ModelStateError, NoAdapterError
from ..experts import QLoRAExperts
from ..modules import AdapterSite, QLoRALinear, adapter_sites, prepared_state
from .adapter_config import peft_config
from .export_sources import check_not_peft, unwrap
from .fold_plan import first_few
from .formats.expert_files import flatten, module_paths
from .formats.peft_files import PREFIX, AdapterFiles, LoraLayer, only_foldable, read_adapter, write_adapter
from .full_parameters import check_can_hold, full_part, misfits, replace_in_full
from .quantized_base import SIDE_FILE, QuantizedBase
from .sharded import gathered, has_shards


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Path:
    """Write adapter `name` as PEFT files: stock `PeftModel.from_pretrained(base, path)` gives the same logits.

    Beside them, `qlora_compile.json` notes how the base was quantized, for a later `export`. Same adapter, same bytes.
    Of a model that FSDP2 split, every rank has to call it (its rows are gathered), and rank 0 writes.
    Raises NoAdapterError (not prepared, no adapter of that name), OutputError (cannot be written).
    """
    model = unwrap(model)
    files = adapter_files(model, name, plain=True)
    if has_shards(model) and torch.distributed.get_rank() != 0:
        return Path(path)
    return write_adapter(path, files.config, files.tensors, {SIDE_FILE: QuantizedBase.of_model(model).to_json()})


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, allow_pickle: bool = False
) -> None:
    """Load a PEFT folder onto a prepared model as adapter `name`: copied into it if there, else added.

    An adapter that is added is active, with weight 1, and trains; those that were there stay active, and their results add
    up. `set_adapters` chooses. One that is copied into keeps its weight; its ranks must be those of the files.

    Parameters that the adapter trained in full (`modules_to_save`, `bias`) replace the model's, and count for all its
    adapters. Everything is checked before anything changes. Raises ConfigError (a name that no adapter can have),
    CheckpointError (see `read_adapter`), NoAdapterError (the model was not prepared), and AdapterMismatchError naming
    the first few tensors whose module is unknown or whose shape differs, or that the model cannot hold (`check_can_hold`).
    """
    check_adapter_name(name)
    model = unwrap(model)
    sites = _sites(model)
    files = read_adapter(path, allow_pickle=allow_pickle)
    layers, parameters = files.layers(), files.full_parameters()
    embedding = next((module for module, layer in layers.items() if layer.embedding), None)
    special = only_foldable(layers)
    if special is None and embedding is not None:
        special = f"{embedding} is an embedding, whose adapter can be combined and exported, but not trained"
    if special:
        raise AdapterMismatchError(f"The adapter {path} cannot be used here: {special}.")
    problems = [p for module, layer in layers.items() if (p := _layer_problem(sites, module, layer))]
    problems += misfits(model, parameters)
    there = [site for site in sites.values() if name in site.adapters]
    if there:
        problems += [p for site in there if (p := _slot_problem(site, name, layers.get(site.name)))]
        problems += [f"{m} has no adapter {name!r} yet" for m in layers if m in sites and sites[m] not in there]
    if problems:
        raise AdapterMismatchError(f"The adapter {path} does not fit the model: {first_few(problems)}.")
    check_can_hold(model, path, name, parameters)
    if not there:
        _add(model, name, layers)
    if not there or any(layers[site.name].scaling != site.scaling(name) for site in there):
        _forget_compiled(model)
    with torch.no_grad():
        for module, layer in layers.items():
            site = sites[module]
            site.a(name).copy_(layer.a)
            site.b(name).copy_(layer.b)
            site.info.alpha[name], site.info.scaling[name] = layer.alpha, layer.scaling
        replace_in_full(model, name, parameters)


def set_adapters(
    model: nn.Module,
    weights: Mapping[str, float] | Iterable[str] | str | None = None,
    *,
    adapter_ids: Sequence[str | Mapping[str, float] | None] | None = None,
) -> None:
    """`{"a": 0.7, "b": 0.3}`: how strongly each adapter counts; those not named get 0. A name alone counts as 1.

    `adapter_ids` chooses for each row of a batch instead: a name, a mapping of names to weights, or None for the base
    alone. It holds for batches of that many rows until the next call.

    Only small tensors on the model are written, so a compiled model is not compiled again (but once when the choice by
    row begins, changes its number of rows, or ends). An adapter at 0 is still computed. Raises NoAdapterError naming the
    nearest adapter, ConfigError for a weight that is no finite number, ModelStateError where a layer cannot choose by row.
    """
    if (weights is None) == (adapter_ids is None):
        raise ConfigError("set_adapters takes either weights, for every row, or adapter_ids, one for each row.")
    if adapter_ids is not None and (isinstance(adapter_ids, str) or not isinstance(adapter_ids, Sequence)):
        raise ConfigError(f"adapter_ids must be a list with one entry for each row of the batch, got {adapter_ids!r}.")
    model = unwrap(model)
    sites = _sites(model)
    known = sorted({adapter for site in sites.values() for adapter in site.adapters})
    rows = [_wanted(given, known) for given in ([weights] if adapter_ids is None else adapter_ids)]
    if not rows:
        raise ConfigError("adapter_ids is empty: it needs one entry for each row of the batch.")
    if adapter_ids is not None:
        _check_by_row(sites)
    reshaped = False
    with torch.no_grad():
        for site in sites.values():
            for name in site.adapters:
                values = torch.tensor([row.get(name, 0.0) for row in rows])
                reshaped |= site.set_adapter_weight(name, values[0] if adapter_ids is None else values)
    if reshaped:
        _forget_compiled(model)


def _wanted(given: Mapping[str, float] | Iterable[str] | str | None, known: list[str]) -> dict[str, float]:
    """What one row asks for -> {name: weight}, checked."""
    if given is None:
        return {}
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"Adapters are chosen by name, or by a table of names and weights, got {given!r}.")
    wanted = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in wanted.items():
        _check_name(name, known)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"The weight of adapter {name!r} must be a finite number, got {weight!r}.")
    return wanted


def _check_by_row(sites: Mapping[str, AdapterSite]) -> None:
    """A parameter that another module's own code uses gets its adapters added to it: it cannot differ by row."""
    by_row = QLoRALinear, QLoRAExperts
    shared = [name for name, site in sites.items() if site.adapters and not isinstance(site.module, by_row)]
    if shared:
        raise ModelStateError(
            f"adapter_ids cannot choose by row at {shared[0]}, whose weight another module's code uses."
        )


def adapter_weights(model: nn.Module) -> dict[str, float]:
    """Adapter name -> how strongly it counts now, sorted. Raises NoAdapterError (no adapters), ModelStateError (by row)."""
    weights: dict[str, float] = {}
    for site in _sites(unwrap(model)).values():
        for name in site.adapters:
            weight = site.adapter_weight(name)
            if weight.dim():
                raise ModelStateError(
                    "The adapters are chosen by row (adapter_ids): call set_adapters with weights first."
                )
            weights[name] = float(weight)
    return dict(sorted(weights.items()))


def adapter_files(model: nn.Module, name: str, *, plain: bool = False) -> AdapterFiles:
    """Adapter `name` of the model as PEFT's files would hold it; the tensors are the model's own.

    `plain`: relative to the original weights. Where PiSSA, OLoRA or LoftQ took the start A0, B0 out of the base, that is
    `B A - B0 A0`, of twice the rank: [A; A0] and [B, -B0].
    """
    model = unwrap(model)
    sites = {n: s for n, s in _sites(model).items() if name in s.adapters}
    if not sites:
        known = sorted({adapter for site in _sites(model).values() for adapter in site.adapters})
        _check_name(name, known)
    tensors: dict[str, torch.Tensor] = {}
    modules = module_paths({n: site.param_name for n, site in sites.items() if site.experts is not None})
    for site_name, site in sites.items():
        a, b = gathered(site.a(name).detach()), gathered(site.b(name).detach())
        if plain and name in site.info.start:
            start_a, start_b = (tensor.to(a.device, a.dtype) for tensor in site.info.start[name])
            a, b = torch.cat([a, start_a], dim=-2), torch.cat([b, -start_b], dim=-1)
        if site.experts is not None:
            a, b = flatten(a, b)
        module = modules.get(site_name, site_name)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    full = full_part(model, sites)
    doubled = {n for n, site in sites.items() if plain and name in site.info.start}
    return AdapterFiles(peft_config(model, name, sites, full, doubled), tensors | full.tensors)


def install_layers(model: nn.Module, name: str, layers: Mapping[str, LoraLayer], weight: float) -> None:
    """Add adapter `name` with these factors, counting as `weight`. Raises ModelStateError (taken), NoAdapterError."""
    sites = _sites(model)
    _add(model, name, layers)
    with torch.no_grad():
        for module, layer in layers.items():
            sites[module].a(name).copy_(layer.a)
            sites[module].b(name).copy_(layer.b)
            sites[module].adapter_weight(name).fill_(weight)
    _forget_compiled(model)


def _add(model: nn.Module, name: str, layers: Mapping[str, LoraLayer]) -> None:
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: layer.alpha for module, layer in layers.items()}
    add_adapter(model, name, rank=ranks, alpha=alphas, scaling={m: layer.scaling for m, layer in layers.items()})


def _forget_compiled(model: nn.Module) -> None:
    """Compiled graphs hold the set of adapters and their scalings as constants: make the next call compile again."""
    state = prepared_state(model)
    if state is not None and state.reports:
        torch.compiler.reset()


def _layer_problem(sites: Mapping[str, AdapterSite], module: str, layer: LoraLayer) -> str | None:
    site = sites.get(module)
    if site is None:
        return f"the model has no adaptable layer {module}"
    model_shape = *([site.experts] if site.experts else []), site.out_features, site.in_features
    shape = *layer.b.shape[:-1], layer.a.shape[-1]
    if model_shape != shape:
        return f"{module} is {list(model_shape)} in the model, {list(shape)} in the adapter"
    return None


def _slot_problem(site: AdapterSite, name: str, layer: LoraLayer | None) -> str | None:
    """What stops `layer` from being copied into the adapter `name` that the site already has."""
    if layer is None:
        return f"it has nothing for {site.name}"
    if layer.rank != site.rank(name):
        return f"{site.name} has rank {site.rank(name)} in the model, {layer.rank} in the adapter"
    return None


def _sites(model: nn.Module) -> dict[str, AdapterSite]:
    check_not_peft(model)
    sites = adapter_sites(model)
    if not sites:
        raise NoAdapterError("The model has no adapters: call prepare(model, config) first.")
    return sites


def _check_name(name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}."
        raise NoAdapterError(f"The model has no adapter {name!r}: {hint}")
