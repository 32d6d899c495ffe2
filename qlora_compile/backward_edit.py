"""The backward graph under a paged optimizer: what edits it when AOTAutograd hands it over, and what is kept of that.

What is put into the graph follows from the graph and from the optimizers' `PageLink`s, the numbers that the ops name them
by included; these are in the key of AOTAutograd's cache, which then serves an edited graph like any other. What was planned
on the way, for the report, is not in that cache: it lies as a file in ours, and a graph that is served finds it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .config import QLoRAConfig
from .dynamo import guard_numbers, traced_module
from .errors import KernelError
from .fx_utils import placeholders
from .page_ops import PAGER
from .page_plan import PageLink, PageTimeline
from .pass_manager import PassContext, PassResult, run_passes
from .passes import BACKWARD_PIPELINE
from .passes.page_optimizer import page_optimizer
from .report import CompileReport
from .state import ModelEdits


@dataclass(frozen=True)
class _Plan:
    """What the passes over a backward graph did, and when pages move in it."""

    passes: list[PassResult]
    timelines: list[PageTimeline]

    def to_json(self) -> str:
        fields = {"passes": [asdict(p) for p in self.passes], "timelines": [asdict(t) for t in self.timelines]}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str | bytes) -> _Plan:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        fields = json.loads(text)
        passes = [PassResult(**p | {"declined": tuple(map(tuple, p["declined"]))}) for p in fields["passes"]]
        return cls(passes, [PageTimeline.from_dict(t) for t in fields["timelines"]])


class BackwardEdit:
    """Edits the backward graphs of one compiled graph, and keeps `report` to what is known of the last of them."""

    def __init__(
        self,
        links: tuple[PageLink, ...],
        work: fx.GraphModule,
        config: QLoRAConfig,
        graph_number: int,
        report: CompileReport,
    ) -> None:
        self.key = repr((links, _hints(work)))  # equal keys, equal edits of equal graphs
        self._links, self._config, self._number, self._report = links, config, graph_number, report
        self._before = list(report.passes)
        self._file: Path | None = None

    def expect(self, gm: fx.GraphModule) -> None:
        """`gm` is compiled by Inductor now. Where AOTAutograd serves it there is no backward graph to edit: show what was
        planned for it when it was edited."""
        from .runtime.kernels import cpp_build

        try:
            self._file = cpp_build.cache_dir() / f"plan-{_digest(gm)}.json"
            plan = _Plan.from_json(self._file.read_bytes())
        except (KernelError, OSError, ValueError, KeyError, TypeError):  # no folder, not there, or not ours
            reason = "its plan is not at hand: the backward pass comes from torch's cache, or was not compiled yet"
            plan = _Plan([_declined(gm, [(link.optimizer, reason) for link in self._links])], [])
        self._show(plan)

    def __call__(self, gm: fx.GraphModule) -> None:
        """Edit a backward graph in place. Raises PassError."""
        nothing = ModelEdits(nn.Module(), self._config)  # Dynamo keeps this object, which must not keep the model
        ctx = PassContext(self._config, nothing, graph_number=self._number, pages=self._links, phase="backward")
        plan = _Plan(run_passes(gm, ctx, BACKWARD_PIPELINE).passes, ctx.timelines)
        self._show(plan)
        self._keep(plan)

    def _show(self, plan: _Plan) -> None:
        self._report.passes[:] = [*self._before, *plan.passes]
        self._report.paging[:] = plan.timelines

    def _keep(self, plan: _Plan) -> None:
        from .runtime.kernels import cpp_build

        if self._file is not None:
            # a cache that is complete may be read-only; the report of a graph that is served says what it does not know
            with contextlib.suppress(KernelError):
                cpp_build.write_atomically(self._file, plan.to_json().encode())


def backward_edit(
    work: fx.GraphModule, ctx: PassContext, report: CompileReport, trained: Mapping[fx.Node, nn.Parameter]
) -> BackwardEdit | None:
    """What edits the backward graph, where a paged optimizer has pages to move for the inputs of `work`; else None."""
    from .runtime.paging_link import page_links

    if not torch.is_grad_enabled():
        return None  # and no backward graph
    names = {id(parameter): name for name, parameter in ctx.edits.root.named_parameters()}
    nodes = placeholders(work.graph)
    found = [(i, trained.get(node)) for i, node in enumerate(nodes)]
    links = page_links({i: (names.get(id(p), f"input {i}"), p) for i, p in found if p is not None})
    if not links:
        return None
    reasons = [link.idle_reason() or _shared_reason(link, ctx.edits.root) for link in links]
    declined = [(link.optimizer, reason) for link, reason in zip(links, reasons) if reason is not None]
    if declined:
        report.passes.append(_declined(work, declined))
    links = tuple(link for link, reason in zip(links, reasons) if reason is None)
    if not links:
        return None
    guard_numbers(nodes[position] for link in links for position in link.parameters)
    return BackwardEdit(links, work, ctx.config, ctx.graph_number, report)


def _shared_reason(link: PageLink, root: nn.Module) -> str | None:
    """Why this graph's code is likely to run for other parameters of the optimizer, too, or None. With page ops, which name
    parameters, it would be compiled for each of them.

    Dynamo serves a module by what it compiled for another one of the same class, after a graph break and where each layer
    is compiled by itself.
    """
    if len(link.parameters) == link.in_all:
        return None
    if sum(getattr(parameter, PAGER, -1) == link.pager for parameter in root.parameters()) < link.in_all:
        return (
            "it has parameters outside of the compiled module, whose code may serve equal modules: they page without it"
        )
    module = traced_module()
    if module is None or (module is not root and sum(type(other) is type(module) for other in root.modules()) > 1):
        return "the model is compiled in pieces, of which one may serve several layers: they page without it"
    return None


def _declined(gm: fx.GraphModule, reasons: Sequence[tuple[str, str]]) -> PassResult:
    """The pass, where it had no graph to run on."""
    size = len(gm.graph.nodes)
    return PassResult(page_optimizer.__name__, 0, 0.0, tuple(reasons), size, size)


def _hints(gm: fx.GraphModule) -> list[int]:
    """Of sizes that are symbols, the ones that it is compiled at: the schedule's clock reads them."""
    values = [node.meta.get("example_value") for node in placeholders(gm.graph)]
    sizes = [size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
    return [size.node.hint for size in sizes if isinstance(size, torch.SymInt)]


def _digest(gm: fx.GraphModule) -> str:
    """Of what the backward graph follows from: code, inputs, what of our marks is no code, and torch's settings."""
    from torch._functorch import config as aot_config
    from torch._inductor import config as inductor_config

    modules = [(name, module) for name, module in gm.named_modules() if isinstance(module, fx.GraphModule)]
    settings = [aot_config.get_hash(), inductor_config.get_hash()]
    parts: list[Any] = [torch.__version__, *settings, gm.qlora_cache_key]
    for name, module in modules:
        parts += [name, module.code, *(_about(node.meta.get("example_value")) for node in placeholders(module.graph))]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _about(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.device, [*value.shape], [*value.stride()], value.requires_grad
