"""Adapters + the names and shapes of a base -> which tensor gets which terms. No weight of the base is read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import AdapterMismatchError
from .described_model import LinearLayout
from .expert_layout import ExpertLayout, ExpertRows
from .fold import LoraTerm
from .formats.checkpoint_dir import TensorSpec
from .formats.peft_files import AdapterFiles, LoraLayer

FOLDABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter, how strongly it counts (`full`: what it trained in full, None as the rest), and its name in messages."""

    label: str
    weight: float
    files: AdapterFiles
    folder: Path | None = None
    full: float | None = None

    @property
    def full_weight(self) -> float:
        return self.weight if self.full is None else self.full


@dataclass
class Target:
    """What happens to one written tensor: it starts from `source` (a key of the base) and gets terms added.

    `full` are tensors trained in full (weight w, tensor S): W becomes (1 - sum w) * W + sum w * S, which is S itself
    for the usual single w = 1. `transposed`: W is [in, out] (Conv1D) or [vocab, dim] (an embedding).
    `magnitude` [out] is DoRA's: the length that each row of the sum gets. `bias` are vectors added to it (`lora_bias`).
    `parameter` is its name in the model, which may have a prefix that the checkpoint's key lacks. `expert`: the
    tensor holds rows of that parameter's experts.
    """

    source: str
    parameter: str
    dtype: torch.dtype
    terms: list[LoraTerm] = field(default_factory=list)
    full: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    magnitude: torch.Tensor | None = None
    bias: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    transposed: bool = False
    embedding: bool = False
    requantize: bool = False
    expert: ExpertRows | None = None

    @property
    def fold_options(self) -> dict[str, Any]:
        """Keywords of `fold` and `measure`."""
        return {"transposed": self.transposed, "magnitude": self.magnitude}


@dataclass
class FoldPlan:
    """Written key -> Target, for every tensor that is not just copied; `untie`: head and embedding now differ."""

    targets: dict[str, Target] = field(default_factory=dict)
    untie: bool = False


def plan_fold(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    adapters: Sequence[WeightedAdapter],
    renamed: Mapping[str, str] | None = None,
    model: nn.Module | None = None,
) -> FoldPlan:
    """Match each adapter's tensors with the base's; `config` is the base's config.json, `model` the base if in memory.

    `renamed`: parameter's name -> key, where the base has another name for it (`renamed_keys`).

    Raises AdapterMismatchError naming the first few keys that the base does not have, or whose shapes differ.
    """
    tied = _tied_pair(specs, config)
    known = dict(specs)
    if tied and tied[0] not in known:
        known[tied[0]] = specs[tied[1]]
    plan, layout, linears = FoldPlan(), ExpertLayout(config), LinearLayout(config, model)
    for adapter in adapters:
        problems: list[str] = []
        for module, layer in adapter.files.layers().items():
            if layer.experts and resolve_key(module, known, renamed) is None:
                problems += _add_experts(plan, known, layout.tensors(module), layer, adapter)
                continue
            # A parameter that is used by other code than a linear module's carries its adapter under its own name.
            key = resolve_key(f"{module}.weight", known, renamed) or resolve_key(module, known, renamed)
            problem = _add_layer(plan, known, key, module, layer, adapter, layout, linears)
            problems += [problem] if problem else []
        for name, tensor in adapter.files.full_parameters().items():
            key = resolve_key(name, known, renamed)
            problem = _add_full(plan, known, key, name, tensor, adapter)
            problems += [problem] if problem else []
        if problems:
            raise AdapterMismatchError(f"The adapter {adapter.label} does not fit the base: {first_few(problems)}.")
    _check_dora(plan)
    if tied:
        _settle_tied(plan, dict(specs), tied, adapters)
    return plan


def resolve_key(name: str, keys: Iterable[str], renamed: Mapping[str, str] | None = None) -> str | None:
    """The key for a parameter's name: itself, else what `renamed` says, else the one key that differs by a path's prefix.

    (A hub checkpoint of GPT-2 says `h.0...` where the model says `transformer.h.0...`.) None where there is no such
    key, or more than one.
    """
    keys = keys if isinstance(keys, Mapping) else set(keys)
    if name in keys:
        return name
    if renamed and name in renamed:
        return renamed[name]
    parts = name.split(".")
    shorter = [key for start in range(1, len(parts) - 1) if (key := ".".join(parts[start:])) in keys]
    longer = [key for key in keys if key.endswith(f".{name}")]
    found = shorter + longer
    return found[0] if len(found) == 1 else None


def first_few(problems: Sequence[str], count: int = 3) -> str:
    """`a; b; c (and 7 more)`."""
    rest = f" (and {len(problems) - count} more)" if len(problems) > count else ""
    return "; ".join(problems[:count]) + rest


def target_of(plan: FoldPlan, specs: Mapping[str, TensorSpec], key: str, parameter: str) -> Target:
    return plan.targets.setdefault(key, Target(source=key, parameter=parameter, dtype=specs[key].dtype))


def _add_layer(
    plan: FoldPlan,
    specs: Mapping[str, TensorSpec],
    key: str | None,
    module: str,
    layer: LoraLayer,
    adapter: WeightedAdapter,
    layout: ExpertLayout,
    linears: LinearLayout,
) -> str | None:
    """Add one LoRA layer to the plan; returns what is wrong with it, or None."""
    if key is None:
        return f"the base has no {module}.weight"
    spec = specs[key]
    if spec.dtype not in FOLDABLE:
        return f"{key} is stored as {spec.dtype}, into which nothing can be folded"
    shape = (*layer.b.shape[:-1], layer.a.shape[-1])
    other = (*shape[:-2], shape[-1], shape[-2])
    if shape != other:
        flipped = spec.shape == other
    elif layer.experts:
        flipped = layout.is_transposed(module)
    else:
        # PEFT asks each module's class and saves one flag for all of them, so the flag is for a class that is not known.
        known = resolve_key(module, linears.modules())
        flag = bool(adapter.files.config.get("fan_in_fan_out"))
        flipped = layer.embedding or (flag if known is None else linears.modules()[known])
    if spec.shape != (other if flipped else shape):
        return f"{key} is {list(spec.shape)} in the base, {list(shape)} in the adapter"
    target = target_of(plan, specs, key, module if layer.parameter else f"{module}.weight")
    target.terms.append(LoraTerm(layer.a, layer.b, adapter.weight * layer.scaling))
    target.transposed = flipped
    target.embedding = layer.embedding
    if layer.magnitude is not None:
        if adapter.weight != 1:
            return f"{module} uses DoRA, which has no weighted form: give it the weight 1"
        target.magnitude = layer.magnitude
    if layer.bias is not None:
        bias = resolve_key(f"{module}.bias", specs)
        if bias is None:
            return f"{module} has a bias on lora_B (lora_bias), but the base has no {module}.bias to fold it into"
        target_of(plan, specs, bias, f"{module}.bias").bias.append((adapter.weight * layer.scaling, layer.bias))
    return None


def _check_dora(plan: FoldPlan) -> None:
    """DoRA's lengths are those of base + its own adapter. Raises AdapterMismatchError where another one is added."""
    for key, target in plan.targets.items():
        if target.magnitude is not None and len(target.terms) > 1:
            raise AdapterMismatchError(f"{key} gets a DoRA adapter and another one: fold them one after the other.")


def _add_experts(
    plan: FoldPlan,
    specs: Mapping[str, TensorSpec],
    held: Mapping[str, ExpertRows],
    layer: LoraLayer,
    adapter: WeightedAdapter,
) -> list[str]:
    """Add the adapters of fused experts that the checkpoint holds in tensors of its own; returns what is wrong."""
    problems = []
    for name, rows in held.items():
        key = resolve_key(name, specs)
        if key is None:
            problems.append(f"the base has no {name}")
            continue
        a, b = rows.own_part(layer.a, layer.b)
        matrix = (a.shape[-1], b.shape[-2]) if rows.transposed else (b.shape[-2], a.shape[-1])
        shape = (*a.shape[:-2], *matrix)
        if specs[key].shape != shape or specs[key].dtype not in FOLDABLE:
            problems.append(f"{key} is {list(specs[key].shape)} of {specs[key].dtype}, {list(shape)} in the adapter")
            continue
        target = target_of(plan, specs, key, rows.parameter)
        target.terms.append(LoraTerm(a, b, adapter.weight * layer.scaling))
        target.transposed, target.expert = rows.transposed, rows
    return problems


def _add_full(
    plan: FoldPlan,
    specs: Mapping[str, TensorSpec],
    key: str | None,
    name: str,
    tensor: torch.Tensor,
    adapter: WeightedAdapter,
) -> str | None:
    """Add one parameter that was trained in full; returns what is wrong with it, or None."""
    if key is None:
        return f"the base has no {name}"
    if specs[key].shape != tuple(tensor.shape):
        return f"{key} is {list(specs[key].shape)} in the base, {list(tensor.shape)} in the adapter"
    if specs[key].dtype not in FOLDABLE and adapter.full_weight != 1:
        return f"{key} is stored as {specs[key].dtype}, which cannot be weighted"
    target_of(plan, specs, key, name).full.append((adapter.full_weight, tensor))
    return None


def _tied_pair(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(head, embedding) of a language model whose head is its embedding; None where they are two tensors."""
    tie = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    if tie is False or not any(str(a).endswith(_WITH_HEAD) for a in config.get("architectures") or ()):
        return None
    embeddings = [key for key in specs if key.endswith(_EMBEDDINGS)]
    heads = [key for key in specs if key.endswith(_HEADS)]
    if len(embeddings) != 1 or len(heads) > 1 or (heads and tie is None):
        return None
    return (heads[0] if heads else _HEADS[0]), embeddings[0]


def _settle_tied(
    plan: FoldPlan, specs: dict[str, TensorSpec], tied: tuple[str, str], adapters: Sequence[WeightedAdapter]
) -> None:
    """A head and an embedding that were one tensor: keep them one where they stay equal, else write both.

    PEFT computes with a head that it has untied as soon as one of the two is trained, so folding into the shared
    tensor would change the other one (peft: `ensure_weight_tying` is the exception).
    """
    head, embedding = (plan.targets.get(key) for key in tied)
    if head is None and embedding is None:
        return
    if head is None and any(adapter.files.config.get("ensure_weight_tying") for adapter in adapters):
        return
    if head and embedding and not head.terms and not embedding.terms and _same_full(head, embedding):
        if tied[0] not in specs:
            del plan.targets[tied[0]]
        return
    plan.untie = True
    if tied[0] not in specs:
        target_of(plan, specs | {tied[0]: specs[tied[1]]}, tied[0], tied[0]).source = tied[1]


def _same_full(one: Target, other: Target) -> bool:
    return len(one.full) == len(other.full) and all(
        w1 == w2 and t1.dtype == t2.dtype and torch.equal(t1, t2)
        for (w1, t1), (w2, t2) in zip(one.full, other.full, strict=True)
    )
