"""What a paged optimizer would do over a traced backward graph: the pass `page_optimizer` itself, with no optimizer made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from .backend import local_device
from .page_plan import PagedParameter, PlannedOptimizer
from .pass_manager import PassContext, run_passes
from .report import CompileReport
from .state import ModelEdits


def plan_pages(
    report: CompileReport,
    backward: fx.GraphModule | None,
    inputs: Sequence[Any],
    model: nn.Module,
    optimizer: PlannedOptimizer,
) -> dict[int, PagedParameter]:
    """Insert the paging ops into `backward`, in place; passes and timelines go to the report.

    `inputs` are those of the graph that was traced. Returns the parameters with a gradient there, by number.
    """
    from .passes import BACKWARD_PIPELINE
    from .runtime.paging_link import planned_link

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    number = {id(parameter): index for index, (_, parameter) in enumerate(named)}
    found = {i: number[id(value)] for i, value in enumerate(inputs) if id(value) in number}
    if backward is None or not found:
        return {}
    link = planned_link(optimizer, {i: named[n] for i, n in found.items()}, found, local_device())
    context = PassContext(report.config, ModelEdits(model, report.config), pages=(link,), phase="backward")
    report.passes += run_passes(backward, context, BACKWARD_PIPELINE).passes
    report.paging += context.timelines
    return {parameter.number: parameter for parameter in link.parameters.values()}
