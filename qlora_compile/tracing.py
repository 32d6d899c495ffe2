"""`trace`: the whole pipeline on a model without weights, and what a training step of it would need.

The model is copied to the meta device, equal layers are traced three times whatever their number, and the report is
unfolded to all of them. Nothing of the model given is changed, and nothing is quantized for real.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from .backend import _compile, local_device
from .config import QLoRAConfig
from .dynamo import quiet_fakes, real_scalars, surfaced
from .errors import ModelStateError, NoTargetError, QLoRACompileError
from .fx_utils import copy_graph
from .interruption import check, deferred
from .kernel_report import KernelReport, with_sources
from .lowering import Lowering
from .memory_plan import MemoryPlan, unroll
from .modules import prepared_state
from .page_plan import PagedParameter, PlannedOptimizer
from .page_trace import plan_pages
from .pass_manager import NodeRecord, PassResult, snapshot
from .preparation import call_arguments
from .repetition import Repeat, find_repeats, fold_layers, unfold_name
from .report import CompileReport, LinearReport, device_kernel_sources, explain, used_kernels
from .resident import bytes_of, resident_bytes
from .state import ModelEdits
from .step_graphs import capture_step
from .step_plan import Symbols, plan_of


@dataclasses.dataclass
class _Traced:
    """One run of the pipeline over a model on the meta device."""

    model: nn.Module
    report: CompileReport
    graphs: list[tuple[fx.GraphModule, list[Any]]]
    code: dict[str, str]


@deferred()
def trace(
    model: nn.Module,
    example_inputs: Any,
    config: QLoRAConfig | Mapping[str, Any] | None = None,
    *,
    fold: bool = True,
    symbols: Symbols | None = None,
    optimizer: PlannedOptimizer | None = None,
    device: str | None = None,
) -> CompileReport:
    """The pipeline on `model` with no weights in memory -> CompileReport, with forward and backward among the stages.

    `example_inputs` is a tuple of positional or a mapping of keyword arguments of `forward`; their values are not read.
    A model on the meta device is enough; it is not changed. `fold=False` traces every layer even where they are equal.
    `report.plan` is the life of every buffer over a step (None if the model has graph breaks). Nothing is outlined: each
    layer is shown, and the pass's row says where compiling would make them one region.
    `optimizer`: what a paged optimizer would do over the backward pass, in `report.paging` and the plan; its order is
    that of all layers, so every layer is traced. `device`, "cpu" or "cuda": whose chunks of the loss the plan has (None:
    this machine's).

    Raises what `prepare` raises, and ModelStateError where the model needs values to be traced.
    """
    config = QLoRAConfig.from_options(config)
    wanted = config.outline_layers
    config = dataclasses.replace(config, outline_layers=False)
    if not isinstance(model, nn.Module):
        raise ModelStateError(f"trace needs an nn.Module, got {type(model).__name__}.")
    work = meta_copy(model)
    keep_no_cache(work)
    arguments = tree_map(_on_meta, call_arguments(model, example_inputs))
    found = _repeats(work, config) if prepared_state(work) is None else []
    alike = config.activation_budget == 1 and optimizer is None  # a budget may recompute some layers only
    repeats = found if fold and alike else []
    fold_layers(work, repeats)
    fewer = [_with_two_units(work, repeat) for repeat in repeats]
    traced = _run(work, arguments, config)
    report = _unfolded(traced, repeats)
    for repeat, smaller in zip(repeats, fewer):
        passes = _run(smaller, arguments, config).report.passes
        report.passes = [_extrapolated(p, few, repeat) for p, few in zip(report.passes, passes, strict=True)]
    outlined = _outlines(dataclasses.replace(config, outline_layers=wanted), found, report.passes[-1].nodes_after)
    if outlined:
        report.passes = [_left_apart(p) if p.name == "outline_layers" else p for p in report.passes]
    _add_step(report, traced, repeats, symbols, optimizer, device, outlined)
    report.choices = with_sources(report.choices, of_others=True)
    report.kernels = device_kernel_sources(local_device(), used_kernels(report), build=False)
    return report


def meta_copy(model: nn.Module) -> nn.Module:
    """The model with every parameter and buffer on the meta device; ties between them stay. No data is copied."""
    model = getattr(model, "_orig_mod", model)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.to("meta")
    return copy.deepcopy(model, memo)


def keep_no_cache(model: nn.Module) -> None:
    """A training step keeps no keys and values, whatever transformers' configuration says of generating."""
    for module in model.modules():
        settings = getattr(module, "config", None)
        if getattr(settings, "use_cache", False):
            settings.use_cache = False  # type: ignore[union-attr]


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _repeats(model: nn.Module, config: QLoRAConfig) -> list[Repeat]:
    edits = ModelEdits(model, config)
    decisions: dict[str, Any] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        entry = edits.find(param)
        if entry is not None:
            site = name.removesuffix(".weight")
            saved, reason = edits.saved_in_full(entry), edits.decline_reason(entry)
            dense = not edits.quantizes_weight(entry)
            decisions[name] = (saved, reason, dense, config.rank_for(site), config.scaling_for(site))
    return find_repeats(model, decisions.get)


def _outlines(config: QLoRAConfig, repeats: Sequence[Repeat], nodes: int) -> bool:
    """Whether compiling the model, `nodes` in all, would outline its equal layers: what they share is nearly all of it."""
    from .passes.outline_layers import flat_reason

    saved = max((nodes * (repeat.units - 1) // repeat.units for repeat in repeats), default=0)
    return config.outline_layers is True or (config.outline_layers == "auto" and flat_reason(saved, config) is None)


def _left_apart(result: PassResult) -> PassResult:
    reason = "a trace shows each of them; compiling makes them one region"
    return dataclasses.replace(result, declined=(*result.declined, ("equal layers", reason)))


def _with_two_units(model: nn.Module, repeat: Repeat) -> nn.Module:
    """The folded model with one unit of this list less: what a unit adds is the difference."""
    smaller = copy.deepcopy(model)
    layers: Any = smaller.get_submodule(repeat.path)
    drop = range(repeat.head + repeat.period, repeat.head + 2 * repeat.period)
    kept = [layer for i, layer in enumerate(layers) if i not in drop]
    layers._modules.clear()
    layers._modules.update({str(i): layer for i, layer in enumerate(kept)})
    return smaller


def _run(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], config: QLoRAConfig) -> _Traced:
    """Compile `model` with the pipeline alone and call it once, on the meta device."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, inputs))
        return gm.forward

    args, kwargs = arguments
    code: dict[tuple[int, int, str], str] = {}
    backend = _backend(dataclasses.replace(config, dump_dir=None), keep, code)
    torch._dynamo.reset_code(type(model).forward.__code__)
    try:
        with quiet_fakes(), real_scalars():
            torch.compile(model, backend=backend, dynamic=False)(*args, **kwargs)
    except (RuntimeError, torch._dynamo.exc.Unsupported) as error:
        if isinstance(error, QLoRACompileError) or "meta" not in f"{type(error).__name__} {error}".lower():
            raise  # torch's errors about a missing value all name the meta device
        said = re.search(r"""got \w+\(["'](.+?)(?:\. |["']\))""", str(error), re.DOTALL)  # of Dynamo's own wording
        reason = said[1] if said else next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ModelStateError(
            f"{type(model).__name__} cannot be traced without its weights: {reason}. Compile the real model "
            "and use explain(model)."
        ) from error
    finally:
        torch._dynamo.reset_code(type(model).forward.__code__)
    check()
    if prepared_state(model) is None:
        raise NoTargetError(f"No linear layer was found while tracing {type(model).__name__}: check target_modules.")
    report = explain(model)
    report.config = config
    return _Traced(model, report, graphs, {stage[-1]: text for stage, text in sorted(code.items(), reverse=True)})


def _backend(config: QLoRAConfig, lower: Lowering, code: dict[tuple[int, int, str], str]) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        try:
            return _compile(gm, list(example_inputs), config, lower, code=code)
        except QLoRACompileError as error:
            raise surfaced(error) from error.__cause__

    return backend


# --- from the traced layers to all of them -----------------------------------------------------------------------


def _unfolded(traced: _Traced, repeats: list[Repeat]) -> CompileReport:
    """The report with the names, counts and bytes of the whole model."""
    report = traced.report
    report.traced, report.code, report.repeats = True, traced.code, repeats
    report.stages = {stage: _counted(records, repeats) for stage, records in report.stages.items()}
    report.linears = _in_layer_order([copy for linear in report.linears for copy in _copies(linear, repeats)], repeats)
    resident = resident_bytes(traced.model, repeats)
    before = sum(linear.bytes_before for linear in report.linears)
    after = sum(linear.bytes_after for linear in report.linears)
    count = sum(math.prod(linear.shape) for linear in report.linears)
    frozen = sum(amount for kind, amount in resident.items() if kind != "adapters")
    buffers = bytes_of(traced.model.named_buffers(), repeats)
    report.memory = {
        "linears_before": before,
        "linears_after": after,
        "bits_per_weight": after * 8 / max(count, 1),
        "model_before": frozen - buffers - after + before,
        "model_after": frozen - buffers,
        "trainable": resident.get("adapters", 0) + resident.get("trained", 0),
    }
    for choice in report.choices:
        choice.modules = tuple(name for module in choice.modules for name in unfold_name(module, repeats))
    return report


def _counted(records: tuple[NodeRecord, ...], repeats: list[Repeat]) -> tuple[NodeRecord, ...]:
    return tuple(dataclasses.replace(r, repeat=len(unfold_name(r.module, repeats))) for r in records)


def _with_kernels(records: tuple[NodeRecord, ...], choices: Sequence[KernelReport]) -> tuple[NodeRecord, ...]:
    """AOTAutograd's graphs know an op's module only; its kernel is what was chosen there, or (experts' parameters stand for
    several) everywhere below."""
    chosen = {(c.op, module): c.kernel for c in choices for module in c.modules}

    def kernels(record: NodeRecord) -> tuple[tuple[str, str], ...]:
        op = re.sub("^(linear_cross_entropy)_(grads|logits)$", r"\1", record.target.removeprefix("qlora."))
        here = chosen.get((op, record.module))
        prefix = f"{record.module}."
        below = {name for (of, module), name in chosen.items() if of == op and module.startswith(prefix)}
        names = below if here is None else {here}
        return tuple((op, name) for name in names) if len(names) == 1 else record.kernels

    return tuple(dataclasses.replace(r, kernels=kernels(r)) for r in records)


def _copies(linear: LinearReport, repeats: list[Repeat]) -> list[LinearReport]:
    names = unfold_name(linear.name, repeats)
    groups = zip(*[unfold_name(name, repeats) for name in linear.group]) if linear.group else [()] * len(names)
    return [dataclasses.replace(linear, name=name, group=tuple(group)) for name, group in zip(names, groups)]


def _in_layer_order(linears: list[LinearReport], repeats: list[Repeat]) -> list[LinearReport]:
    """Stable: the linears of one list stand together, by layer; the others stay where they were."""
    first: dict[str, int] = {}

    def key(item: tuple[int, LinearReport]) -> tuple[int, int]:
        position, linear = item
        for repeat in repeats:
            parts = repeat.split(linear.name)
            if parts is not None:
                return first.setdefault(repeat.path, position), parts[1]
        return position, 0

    return [linear for _, linear in sorted(enumerate(linears), key=key)]


def _extrapolated(result: PassResult, fewer: PassResult, repeat: Repeat) -> PassResult:
    """Counts of the whole model: what one unit more added is what each further unit adds."""
    more = repeat.units - repeat.traced_units
    declined = [(name, why) for what, why in result.declined for name in unfold_name(what, [repeat])]
    return dataclasses.replace(
        result,
        rewrites=result.rewrites + more * (result.rewrites - fewer.rewrites),
        nodes_before=result.nodes_before + more * (result.nodes_before - fewer.nodes_before),
        nodes_after=result.nodes_after + more * (result.nodes_after - fewer.nodes_after),
        declined=tuple(declined),
    )


# --- the step ----------------------------------------------------------------------------------------------------


def _add_step(
    report: CompileReport,
    traced: _Traced,
    repeats: list[Repeat],
    symbols: Symbols | None,
    optimizer: PlannedOptimizer | None,
    device: str | None,
    outlined: bool,
) -> None:
    """Forward and backward (of the largest graph) among the stages, and the plan of the whole step."""
    budget, fused = report.config.activation_budget, report.config.lowering == "inductor"
    steps = [capture_step(copy_graph(gm), inputs, budget, fused) for gm, inputs in traced.graphs]
    paged: dict[int, PagedParameter] = {}
    if optimizer is not None:
        for step, (_, inputs) in zip(steps, traced.graphs):
            paged |= plan_pages(report, step.backward, inputs, traced.model, optimizer)
    largest = max(steps, key=lambda step: len(step.forward.graph.nodes))
    for stage, graph in (("forward", largest.forward), ("backward", largest.backward)):
        if graph is not None:
            report.stages[stage] = _with_kernels(_counted(snapshot(graph.graph), repeats), report.choices)
            report.code[stage] = graph.print_readable(print_output=False)
    plan: MemoryPlan | None = plan_of(steps, symbols, paged, device or local_device(), fused, outlined)
    for repeat in repeats:
        plan = unroll(plan, *_unit_functions(repeat)) if plan is not None else None
    if plan is not None:
        plan.resident = resident_bytes(traced.model, repeats)
        if optimizer is not None and optimizer.budget is None:
            plan.resident["optimizer"] = sum(parameter.state_bytes for parameter in paged.values())
    report.plan = plan


def _unit_functions(repeat: Repeat) -> tuple[Callable[[str], int | None], int, Callable[[str, int], str]]:
    def unit_of(module: str) -> int | None:
        parts = repeat.split(f"{module}.")
        return None if parts is None else repeat.unit_of(parts[1])

    def rename(module: str, unit: int) -> str:
        parts = repeat.split(f"{module}.")
        if parts is None:
            return module
        before, traced, after = parts
        if repeat.unit_of(traced) is None:
            index = repeat.originals(traced)[0]
        else:
            index = repeat.head + repeat.period * unit + (traced - repeat.head) % repeat.period
        return f"{before}{index}{after}".removesuffix(".")

    return unit_of, repeat.units, rename
