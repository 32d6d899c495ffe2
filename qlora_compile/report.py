"""`CompileReport`: what the compiler did to a model, as text, plain values and graphs."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .config import QLoRAConfig
from .errors import ModelStateError, UnknownOptionError
from .foreign import ForeignLinear, foreign_linears
from .kernel_report import KernelReport, kernel_reports, with_sources
from .memory_plan import MemoryPlan
from .modules import AdapterSite, adapter_sites, prepared_state
from .page_plan import PageTimeline
from .pass_manager import NodeRecord, PassResult, PipelineResult
from .repetition import Repeat
from .sharding import stored_form

if TYPE_CHECKING:
    from .runtime.export_report import ExportReport

_OP = "lora_linear"
_FORWARD = (_OP, f"grouped_{_OP}")  # the ops whose kernels run a linear's forward
_CODEC = ("dequantize_4bit", "quantize_4bit", "linear_4bit_small", "lora_down")


@dataclass
class LinearReport:
    """One linear: its name, [out, in] (experts: [E, out, in]), stored bits per weight, ranks by adapter, group members,
    lowering, bytes."""

    name: str
    shape: tuple[int, ...]
    bits: float
    rank: dict[str, int]
    group: tuple[str, ...]
    lowering: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class LayerError:
    """Root mean square of (weight - its 4-bit value) over that of the weight; `dense`: suggested to stay dense."""

    name: str
    error: float
    weights: int
    dense: bool = False


@dataclass(frozen=True)
class Variant:
    """One format with its stored bits a weight, the relative error over all layers together, and perplexity on a text."""

    quant_type: str
    block_size: int
    double_quant: bool
    bits: float
    error: float
    perplexity: float | None = None


@dataclass
class CompileReport:
    """Made by `explain(model)` and `trace(...)`. `passes` of the latest graph, `linears` and `memory` of the whole model.

    From `trace` (`traced`) also: `plan`, the life of every buffer over a step; `code`, each stage as Python; `repeats`,
    the lists of equal layers of which only some were traced (a node's `repeat` says how many it stands for).
    """

    model: str
    config: QLoRAConfig
    passes: list[PassResult] = field(default_factory=list)
    linears: list[LinearReport] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    choices: list[KernelReport] = field(default_factory=list)
    stages: dict[str, tuple[NodeRecord, ...]] = field(default_factory=dict)
    graphs: int = 0
    traced: bool = False
    plan: MemoryPlan | None = None
    code: dict[str, str] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)
    numerics: list[LayerError] = field(default_factory=list)
    paging: list[PageTimeline] = field(default_factory=list)  # what paged optimizers do over each backward graph
    formats: list[Variant] = field(default_factory=list)
    perplexity_dense: float | None = None

    @classmethod
    def of_graph(
        cls, root: nn.Module, config: QLoRAConfig, gm: fx.GraphModule, result: PipelineResult
    ) -> CompileReport:
        """The report of one compiled graph: its passes and stages; the rest is read off the model when asked."""
        report = cls(type(root).__name__, config, passes=result.passes, stages=result.stages, graphs=1)
        report.choices = kernel_reports(gm)
        return report

    @property
    def device(self) -> str:
        """The type of device that its kernels were chosen for."""
        return next((choice.device for choice in self.choices), "cpu")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, without the graphs of the stages."""
        return {
            "model": self.model,
            "config": self.config.to_dict(),
            "passes": [asdict(p) for p in self.passes],
            "linears": [asdict(linear) for linear in self.linears],
            "memory": dict(self.memory),
            "kernels": dict(self.kernels),
            "choices": [asdict(choice) for choice in self.choices],
            "stages": list(self.stages),
            "graphs": self.graphs,
            "numerics": [asdict(layer) for layer in self.numerics],
            "paging": [timeline.to_dict() for timeline in self.paging],
            "formats": [asdict(variant) for variant in self.formats],
            "perplexity_dense": self.perplexity_dense,
        }

    def to_networkx(self, pass_name: str) -> Any:
        """The graph after that pass ("input": before all) as a `networkx.DiGraph`; nodes carry the record's fields.

        Raises UnknownOptionError naming the nearest stage.
        """
        from .stage_graph import to_networkx

        return to_networkx(pass_name, self.stage(pass_name))

    def stage(self, name: str) -> tuple[NodeRecord, ...]:
        """The nodes of a stage. Raises UnknownOptionError naming the nearest one."""
        if name not in self.stages:
            raise UnknownOptionError(name, self.stages, what="stage")
        return self.stages[name]

    def print(self, file: Any = None) -> None:
        """Passes with counts and ms, each linear (equal layers as one), bytes before and after."""
        from rich.console import Console

        from .report_text import print_report

        print_report(self, Console(file=file, width=None if file is None else 140))

    def blocks(self) -> list[tuple[str, list[tuple[LinearReport, int]]]]:
        """The linears by repeated block: [(its name or "", [(linear of its first layer, how many there are)])]."""
        from .linear_tree import linear_blocks

        return linear_blocks(self.linears)

    def to_html(
        self, path: Path | str, runs: Sequence[Path | str] = (), exports: Sequence[ExportReport | Path | str] = ()
    ) -> Path:
        """One HTML file that opens offline. `runs` are output folders of `finetune`, `exports` what `export` returned,
        or files with what `export --json` printed. Raises OutputError, CheckpointError."""
        from .web.page import write_page

        return write_page(self, path, runs, exports)

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(text)
        return text.getvalue()


def explain(model: nn.Module) -> CompileReport:
    """What the compiler did to this model. Raises ModelStateError if it was neither prepared nor compiled."""
    model = getattr(model, "_orig_mod", model)
    state = prepared_state(model)
    if state is None:
        raise ModelStateError(
            "There is nothing to explain yet: call the compiled model once, or prepare(model, config), first."
        )
    report = CompileReport(type(model).__name__, state.config)
    if state.reports:
        # the graph with the most nodes is the model's, and of two the one that trains; the others are pieces, or the same
        # for other shapes and modes
        best = max(state.reports, key=lambda r: (len(r.stages["input"]), len(r.passes)))
        report.passes, report.stages, report.graphs = (
            _with_all_declined(best, state.reports),
            best.stages,
            len(state.reports),
        )
        report.choices = with_sources(best.choices)
        report.paging = best.paging
    groups: dict[str, tuple[str, ...]] = {}
    for stages in [*(r.stages for r in state.reports), report.stages]:  # a piece after a graph break has other sites
        groups |= _groups(stages)
    choices = [choice for part in [*state.reports, report] for choice in part.choices if choice.op in _FORWARD]
    lowered = {site: choice.kernel for choice in choices for site in choice.modules}
    sites = adapter_sites(model)
    for site in sites.values():
        report.linears.append(_linear_report(site, groups))
    foreign = {found.name: found for found in foreign_linears(model)}
    for linear in report.linears:  # `quantize=True` on a PEFT model: the site is ours, the adapters are PEFT's
        linear.rank = linear.rank or (foreign[linear.name].rank if linear.name in foreign else {})
    report.linears += [_foreign_report(found, groups) for name, found in foreign.items() if name not in sites]
    report.memory = _memory(model, report.linears)
    report.kernels = kernel_sources(model, report)
    for linear in report.linears:
        linear.lowering = lowered.get(linear.name, linear.lowering)
    return report


def _with_all_declined(best: CompileReport, reports: list[CompileReport]) -> list[PassResult]:
    """The passes of the largest graph, with what was declined in any: after a graph break each piece has its own."""
    declined: dict[str, dict[tuple[str, str], None]] = {}
    for result in (p for report in [best, *reports] for p in report.passes):
        declined.setdefault(result.name, {}).update(dict.fromkeys(result.declined))
    return [replace(p, declined=tuple(declined[p.name])) for p in best.passes]


def _groups(stages: dict[str, tuple[NodeRecord, ...]]) -> dict[str, tuple[str, ...]]:
    """site -> the sites of the op that computes it, at the last stage."""
    last = next(reversed(stages.values()), ())
    return {site: record.sites for record in last if _OP in record.target for site in record.sites}


def _linear_report(site: AdapterSite, groups: dict[str, tuple[str, ...]]) -> LinearReport:
    weight = site.weight
    before = weight.numel() * weight.element_size()
    stored = stored_form(weight)
    after = before if stored is None else stored.stored_bytes
    group = groups.get(site.name, ())
    lowering = "not compiled yet" if not groups else "eager" if not group else _lowering(weight)
    return LinearReport(
        site.name,
        (*([] if site.experts is None else [site.experts]), site.out_features, site.in_features),
        after * 8 / max(weight.numel(), 1),
        {name: site.rank(name) for name in site.adapters},
        group if len(group) > 1 else (),
        lowering,
        before,
        after,
    )


def _foreign_report(found: ForeignLinear, groups: dict[str, tuple[str, ...]]) -> LinearReport:
    group = groups.get(found.name, ())
    lowering = "not compiled yet" if not groups else "as traced" if not group else found.lowering
    return LinearReport(
        found.name,
        found.shape,
        found.stored_bytes * 8 / max(found.shape[0] * found.shape[1], 1),
        found.rank,
        group if len(group) > 1 else (),
        lowering,
        found.dense_bytes,
        found.stored_bytes,
    )


def _lowering(weight: torch.Tensor) -> str:
    return "GEMM" if stored_form(weight) is None else "dequantize + GEMM"


def _memory(model: nn.Module, linears: list[LinearReport]) -> dict[str, float]:
    """Bytes of the model's parameters before and after, and stored bits per quantized weight."""
    sites = {id(site.weight) for site in adapter_sites(model).values()}
    sites |= {id(found.weight) for found in foreign_linears(model)}
    other = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in sites)
    adapters = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    before = sum(linear.bytes_before for linear in linears)
    after = sum(linear.bytes_after for linear in linears)
    weights = sum(math.prod(linear.shape) for linear in linears)
    return {
        "linears_before": before,
        "linears_after": after,
        "bits_per_weight": after * 8 / max(weights, 1),
        "model_before": before + other - adapters,
        "model_after": after + other - adapters,
        "trainable": adapters,
    }


def kernel_sources(model: nn.Module, report: CompileReport) -> dict[str, str]:
    """Source text of each generated kernel that the model's device uses, by op."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return device_kernel_sources(device, used_kernels(report))


def used_kernels(report: CompileReport) -> list[str]:
    """The generated kernels that a report's choices and paged optimizers call, beside those of the codec."""
    from .runtime import kernels

    found = dict.fromkeys(part for choice in report.choices for part in choice.parts)
    if report.paging:
        found["paged_step"] = None
    by_file: dict[str, str] = {}  # one kernel of those in one file
    for op in (*_CODEC, *found):
        by_file.setdefault(kernels.source_name(op, report.device), op)
    return list(by_file.values())


def device_kernel_sources(device: str, ops: Sequence[str], *, build: bool = True) -> dict[str, str]:
    """Source text of generated kernels of a kind of device, its forms one after the other; `build` leaves out those that
    cannot run here or did not run yet."""
    from .runtime import kernels

    found = {}
    for op in ops:
        if not build or kernels.runs(op, device):
            paths = kernels.source_files(op, device, of_others=not build)
            if paths:
                found[op] = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    return found
