"""`torch.compile(model, backend="qlora")`: Dynamo's graph -> passes -> AOTAutograd and Inductor.

It knows both halves: `passes/`, which rewrite the graph, and (through the ops) `runtime/`, which runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from . import layer_tracing, warm_up
from .backward_edit import backward_edit
from .choices import check_choices
from .config import QLoRAConfig
from .dynamo import (
    guard_modules,
    guard_pagers,
    guard_replacements,
    guard_training,
    guards_classes_of,
    real_inputs,
    root_modules,
    surfaced,
    traced_again,
)
from .errors import ConfigError, ModelStateError, QLoRACompileError
from .fx_utils import copy_graph, is_linear, peel_transposes, placeholders
from .interruption import check
from .lowering import Lowering, bind, lowering
from .modules import prepared_config, prepared_state
from .param_info import ParamInfo, is_linear_module
from .pass_manager import Pass, PassContext, run_passes
from .passes import PIPELINE
from .preparation import choose_root, edit_modules, require_targets
from .report import CompileReport
from .state import ModelEdits, check_not_wrapped, check_one_device, check_same_config, expert_targets, linear_entries
from .tensor import QuantizedTensor
from .transformers_loss import name_losses


def qlora(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    pipeline: Sequence[Pass] = PIPELINE,
) -> Callable[..., Any]:
    """The backend. `options` are QLoRAConfig's fields; on a prepared model its own configuration holds.

    Another `pipeline`, with a pass of one's own in it, goes in by `functools.partial`:
    `torch.compile(model, backend=partial(qlora, pipeline=insert_pass(PIPELINE, mine, after="fuse_lora_linear")))`.
    Raises the errors of `prepare`, unchanged, ConfigError for a `mode`, and PassError if a pass fails.
    """
    try:
        if mode not in (None, "default"):
            raise ConfigError(f"The backend 'qlora' knows no mode {mode!r}: leave it out, and choose by options.")
        return _compile(gm, list(example_inputs), options, None, pipeline)
    except QLoRACompileError as error:
        raise surfaced(error) from error.__cause__


def state_only(config: QLoRAConfig) -> Callable[..., Any]:
    """A backend that makes the state edits and then runs the graph as Dynamo gave it: what `prepare` traces with."""

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        try:
            return _compile(gm, list(example_inputs), config, lambda gm, inputs: gm.forward)
        except QLoRACompileError as error:
            raise surfaced(error) from error.__cause__

    return backend


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Mapping[str, Any] | QLoRAConfig | None,
    lower: Lowering | None,
    pipeline: Sequence[Pass] = PIPELINE,
    code: dict[tuple[int, int, str], str] | None = None,
) -> Callable[..., Any]:
    """`code`: where each stage's code is put, by graph, number and name."""
    check()
    root = choose_root(root_modules(gm))
    if root is None:  # a piece of a model without parameters, or a function of tensors: nothing of ours to do
        config = QLoRAConfig.from_options(options)
        return (lower or lowering(config))(gm, example_inputs)
    config = _configuration(root, options)
    check_one_device(root)
    if lower is None and config.lowering == "inductor":
        _warm_up(root, config)
    edits = ModelEdits(root, config)
    if lower is None and prepared_config(root) is None:
        check_choices(edits)
    experts = expert_targets(edits)
    if experts:  # their forward, however it was written, gives way to one that a graph can hold
        edit_modules(edits, experts)
        raise traced_again("the model's experts were quantized")
    if name_losses(root):
        raise traced_again("the model's loss got a name")
    original = real_inputs(gm)
    work = copy_graph(gm)
    nodes = placeholders(work.graph)
    before = prepared_state(root)
    if before is None and not edits.is_foreign:
        check_not_wrapped(root)
    ctx = PassContext(config, edits, graph_number=len(before.reports) if before is not None else 0, code=code)
    ctx.params = {node.name: entry for node, param in zip(nodes, original) if (entry := edits.find(param)) is not None}
    ctx.codes = {node.name: entry for node, t in zip(nodes, original) if (entry := edits.find_codes(t)) is not None}
    ctx.chooser = _chooser(config)
    stored = {
        ctx.params[node.name].name: index
        for index, (node, param) in enumerate(zip(nodes, original))
        if isinstance(param, QuantizedTensor) and node.name in ctx.params
    }
    plain = [entry for entry in ctx.params.values() if entry.site is None]
    with torch.inference_mode(False), torch.enable_grad():
        stages = run_passes(work, ctx, pipeline)
        _check_targets(work, ctx)
        edits.freeze()
    trained = {n: p for n, p in zip(nodes, original) if _trains(p, ctx.params.get(n.name))}
    _install_guards(ctx, nodes, original, stored, trained)
    position = {node.name: index for index, node in enumerate(nodes)}
    _freeze_examples(work, original, position)
    del original
    state = edits.remember()
    if guards_classes_of([module for entry in plain if entry.site is not None for _, module, _ in entry.owners]):
        raise traced_again("modules got a new class")
    report = CompileReport.of_graph(root, config, work, stages)
    lower = lower or lowering(config, functools.partial(backward_edit, work, ctx, report, trained))
    call = bind(work, example_inputs, position, stored, ctx, lower)
    state.reports.append(report)
    return call


def _install_guards(
    ctx: PassContext,
    nodes: list[fx.Node],
    original: list[Any],
    stored: Mapping[str, int],
    trained: Mapping[fx.Node, nn.Parameter],
) -> None:
    """Retrace where the code would no longer fit: other modules, another paged optimizer, dropout switched."""
    guard_replacements([p for node, p in zip(nodes, original) if (e := ctx.params.get(node.name)) and e.param is not p])
    for node in nodes:
        if node.name in ctx.params and (site := ctx.params[node.name].site) is not None and site.info.dropout:
            guard_training(node)
    if any(ref.name.rpartition(".")[0] not in stored for ref in ctx.state.values()):
        guard_modules([node for node in nodes if node.name in ctx.params])  # what is fetched from them fits no others
    guard_pagers(ctx.edits.root, trained)


layer_tracing.BACKENDS.append(qlora)  # whose first pass puts the traced layers in line

# On the meta device these are chosen as for this machine: the report names what would run here.
TRACED_OPS = (
    *("lora_linear", "lora_linear_backward", "grouped_lora_linear", "grouped_lora_linear_backward"),
    *("attention", "linear_cross_entropy"),
)


def _chooser(config: QLoRAConfig) -> Callable[..., Any]:
    """The runtime's answer to passes that ask which kernel runs an op. Raises UnknownOptionError for an unknown kernel."""
    from .runtime import kernels

    kernels.dispatch.check_forced(dict(config.kernels))

    def choose(op: str, forced: str = "", *, device: str, **sizes: Any) -> Any:
        if device == "meta" and op in TRACED_OPS:
            device = local_device()
        return kernels.choose_kernel(op, forced, device=device, tune=config.autotune, **sizes)

    return choose


def local_device() -> str:
    """What a model without weights would run on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _warm_up(root: nn.Module, config: QLoRAConfig) -> None:
    """Let the C++ compiler begin with what needs no graph, if the model runs on a CPU and there is a compiler."""
    from .runtime import kernels

    on_cpu = all(param.device.type == "cpu" for param in root.parameters())
    if on_cpu and kernels.cpp_build.find_compiler() is not None:
        warm_up.start(kernels.find, kernels.cpu.expected(config.compute_dtype))


def _configuration(root: nn.Module, options: Mapping[str, Any] | QLoRAConfig | None) -> QLoRAConfig:
    """The options, or the prepared model's own configuration with what only concerns compiling taken from them."""
    given = QLoRAConfig.from_options(options)
    own = prepared_config(root)
    if own is None:
        return given
    if not options:
        return own
    named = options.to_dict() if isinstance(options, QLoRAConfig) else dict(options)
    merged = QLoRAConfig.from_options(own.to_dict() | named)
    check_same_config(own, merged)
    return merged


def _check_targets(work: fx.GraphModule, ctx: PassContext) -> None:
    """Targets that no pass can reach, or linears without any target on a model without any site: refuse both."""
    edits = ctx.edits
    for node in work.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _check_hidden(node, ctx)
    if any(entry.site is not None for entry in edits.all()) or prepared_config(edits.root) is not None:
        return
    if any(edits.decline_reason(entry) is None for entry, _ in linear_entries(edits)):
        return  # after a graph break: another graph has them
    weights = [ctx.param(peel_transposes(node.args[1])[0]) for node in work.graph.nodes if is_linear(node)]
    linear = {entry.name: entry for entry in weights if entry is not None}
    if linear:
        require_targets([], linear.values(), edits)


def _check_hidden(node: fx.Node, ctx: PassContext) -> None:
    """Raises ModelStateError for a linear inside another operator's subgraph: it would stay dense and have no adapter."""
    for source in node.all_input_nodes:
        entry = ctx.param(source)
        if entry is None or entry.site is not None or not any(is_linear_module(owner) for _, owner, _ in entry.owners):
            continue
        if ctx.edits.decline_reason(entry) is None:
            raise ModelStateError(
                f"{entry.name} is used inside {node.target} (activation checkpointing, for example), where the backend "
                "cannot change it: call qlora_compile.prepare(model, config) before compiling."
            )


def _trains(value: Any, entry: ParamInfo | None) -> bool:
    """Whether this input is a parameter that trains, and still the one that its module holds."""
    return isinstance(value, nn.Parameter) and value.requires_grad and (entry is None or entry.param is value)


def _freeze_examples(work: fx.GraphModule, original: list[Any], position: dict[str, int]) -> None:
    """Dynamo made its fake tensors before the edits froze the model: AOTAutograd reads requires_grad from them."""
    for node in placeholders(work.graph):
        index = position.get(node.name)
        fake = node.meta.get("example_value")
        if index is not None and isinstance(original[index], nn.Parameter) and isinstance(fake, torch.Tensor):
            wanted = original[index].requires_grad
            if fake.requires_grad != wanted:
                fake.requires_grad_(wanted)


__all__ = ["qlora", "state_only"]
