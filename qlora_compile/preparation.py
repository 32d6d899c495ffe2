"""`prepare`: the state edit ahead of time, so that an optimizer can be made before the first step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .attention import is_attention_weight
from .choices import check_choices
from .config import QLoRAConfig, names_module
from .equal_layers import mark_layers
from .errors import ModelStateError, NoTargetError
from .interruption import deferred
from .modules import prepared_config, prepared_state
from .param_info import ParamInfo, is_linear_module
from .saving import save_adapters_of
from .state import (
    ModelEdits,
    check_not_wrapped,
    check_one_device,
    check_same_config,
    expert_entries,
    expert_targets,
    linear_entries,
)
from .transformers_loss import name_losses
from .weight_reads import weights_read_directly


def prepare(
    model: nn.Module, config: QLoRAConfig | Mapping[str, Any] | None = None, example_inputs: Any = None
) -> nn.Module:
    """Quantize the target linears of `model`, add adapters, freeze the rest. In place; returns the model.

    Finds the linear modules (`nn.Linear`, transformers' `Conv1D`) and fused experts. With `example_inputs` (a tuple of
    positional or a mapping of keyword arguments of `forward`) it traces the model once, without running it to the end on
    a compiler, and so also finds linears that are not modules (`F.linear(x, self.w)`, `x @ self.w.T`, `torch.addmm`).

    After it, `model.parameters()` holds the adapters: make the optimizer now. Calling it again with an equal
    configuration changes nothing. The dense weights are freed one by one.

    Warns of entries that name no linear. Raises NoTargetError (no linear matched), ConfigError (a rank is too large,
    modules_to_save that are none), InvalidWeightError (NaN or infinity),
    ModelStateError (several devices, already in DDP or FSDP2, or prepared with another configuration).
    """
    config = QLoRAConfig.from_options(config)
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"prepare needs an nn.Module, got {type(model).__name__}.")
    old = prepared_config(model)
    if old is not None:
        check_same_config(old, config)
        return model
    check_one_device(model)
    check_not_wrapped(model)
    edits = ModelEdits(model, config)
    if example_inputs is not None:
        check_choices(edits)
        if experts := expert_targets(edits):
            edit_modules(edits, experts)
        _trace_edits(model, config, example_inputs)
        _complete(model)
        return model
    found = [*linear_entries(edits), *expert_entries(edits)]
    read = _read_directly(model)
    targets = [(entry, fan) for entry, fan in found if edits.decline_reason(entry) is None and entry.name not in read]
    require_targets([entry for entry, _ in targets], [entry for entry, _ in found], edits)
    check_choices(edits, {entry.name for entry, _ in targets} | set(read))
    chosen = {entry.name for entry, _ in targets} | set(read)
    held = [(entry, fan) for entry, fan in found if edits.is_held(entry) and entry.name not in chosen]
    edit_modules(edits, targets + held)
    _complete(model)
    for name, reader in sorted(read.items()):
        warnings.warn(
            f"{name} stays dense: {reader} reads its weight directly, where an adapter of the module would be passed "
            "by. Give prepare() example_inputs to have it traced and adapted.",
            stacklevel=2,
        )
    for text in _dense_experts(edits):
        warnings.warn(text, stacklevel=2)
    return model


def _dense_experts(edits: ModelEdits) -> list[str]:
    """What to say of experts' matrices that are none as transformers' interface has them: most of such a model's bytes."""
    found: dict[str, list[ParamInfo]] = {}
    for entry in edits.all() if edits.config.target_modules == "all-linear" else ():
        expert = any("experts" in f"{name} {type(module).__name__}".lower() for name, module, _ in entry.owners)
        if expert and entry.param.dim() == 3 and not entry.is_experts and not edits.config.is_excluded(entry.name):
            found.setdefault(edits.decline_reason(entry) or "", []).append(entry)
    return [
        f"{len(entries)} matrices of experts stay dense and get no adapter, {entries[0].name} for one "
        f"({sum(entry.param.nbytes for entry in entries) / 1e6:,.1f} MB in all): {reason}."
        for reason, entries in found.items()
    ]


def edit_modules(edits: ModelEdits, targets: list[tuple[ParamInfo, bool]]) -> None:
    """Quantize these modules' weights (each with whether it is [in, out]), adapt the selected ones, freeze the rest."""
    with torch.inference_mode(False):  # or the new parameters could never train
        for entry, fan_in_fan_out in targets:
            as_module = not any(is_attention_weight(module, key) for _, module, key in entry.owners)
            site = edits.quantize(entry, fan_in_fan_out=fan_in_fan_out, as_module=as_module)
            if edits.selects(entry):
                edits.add_adapter(site)
        edits.freeze()
    edits.remember()


def choose_root(roots: Sequence[nn.Module]) -> nn.Module | None:
    """The model that the backend edits, of those that one compiled function calls.

    That is the one with linears that trains: a frozen teacher stays as it is. Where one is prepared already, it alone was
    meant. Raises ModelStateError where several could be meant.
    """
    ready = [root for root in roots if prepared_config(root) is not None]
    linear = [root for root in roots if any(is_linear_module(module) for module in root.modules())]
    trained = [root for root in linear if any(param.requires_grad for param in root.parameters())]
    wanted = ready[:1] or trained or linear
    if len(wanted) > 1:
        names = " and ".join(type(root).__name__ for root in wanted)
        raise ModelStateError(
            f"The compiled function calls several models ({names}), and the backend edits one: call "
            "qlora_compile.prepare(model, config) before compiling on each that it should edit."
        )
    return next(iter([*wanted, *roots]), None)


def _complete(model: nn.Module) -> None:
    state = prepared_state(model)
    assert state is not None
    state.complete = True
    mark_layers(model)
    name_losses(model)
    save_adapters_of(model)


def _read_directly(model: nn.Module) -> dict[str, str]:
    """Linear modules whose weight their parent's own code reads: module name -> class name of the parent."""
    found = {}
    for path, module in model.named_modules():
        for child, reader in weights_read_directly(module).items():
            if is_linear_module(module._modules[child]):  # type: ignore[arg-type]
                found[f"{path}.{child}".lstrip(".")] = reader
    return found


def require_targets(targets: Iterable[ParamInfo], found: Iterable[ParamInfo], edits: ModelEdits) -> None:
    """Raises NoTargetError, listing what there was, if no linear is a target; and for an embedding named as one.

    A model of PEFT's or bitsandbytes' may have none.
    """
    if edits.is_foreign:
        return
    _refuse_embeddings(edits)
    if list(targets):
        return
    found = list(found)
    named = edits.config.target_modules
    if isinstance(named, str) and any(names_module((named,), _linear_name(entry)) for entry in found):
        hint = f" (a regular expression for the whole name; did you mean [{named!r}]?)"
    else:
        hint = ""
    names = [f"{_linear_name(entry)} ({edits.decline_reason(entry)})" for entry in found]
    what = f"it has: {'; '.join(names[:8])}{f'; and {len(names) - 8} more' if len(names) > 8 else ''}"
    raise NoTargetError(
        f"No linear layer of {type(edits.root).__name__} matches target_modules={named!r}{hint}: "
        + (
            what
            if names
            else "it has no linear module; give prepare() example_inputs to find linears that are not modules"
        )
        + "."
    )


def _refuse_embeddings(edits: ModelEdits) -> None:
    named = edits.config.target_modules
    for name, module in [] if isinstance(named, str) else edits.root.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and names_module(named, name):
            raise NoTargetError(
                f"target_modules names {name!r}, an embedding, whose adapters cannot be trained here: leave it out, or "
                "train it in full by naming it in modules_to_save."
            )


def _linear_name(entry: ParamInfo) -> str:
    """The name that the user knows the linear by: the owner's that is one, not an embedding's that it is tied to."""
    return next((name for name, module, _ in entry.owners if is_linear_module(module)), entry.name)


def _trace_edits(model: nn.Module, config: QLoRAConfig, example_inputs: Any) -> None:
    """Run the compiler's own pipeline once for its state edits; nothing is compiled and the graph is thrown away."""
    from . import backend

    args, kwargs = call_arguments(model, example_inputs)
    tracer = torch.compile(model, backend=backend.state_only(config))
    with deferred(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "keep_logits=False has no effect")  # of this trace, which is thrown away
        tracer(*args, **kwargs)
    torch._dynamo.reset_code(type(model).forward.__code__)
    if prepared_config(model) is None:
        raise NoTargetError(
            f"No linear layer was found while tracing {type(model).__name__}: check example_inputs and target_modules."
        )


def call_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as they are given -> (positional, keyword) arguments. Raises ModelStateError for an unknown name."""
    if isinstance(example_inputs, Mapping):
        known = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        unknown = [name for name in example_inputs if name not in known and not open_ended]
        if unknown:
            raise ModelStateError(f"example_inputs names {unknown[0]!r}, which {type(model).__name__}.forward lacks.")
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}
