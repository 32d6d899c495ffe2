"""A rewritten graph -> the forward and backward graphs of one training step, on fake tensors: no weight, no kernel.

The device is the CPU whatever machine the model is for: its kernels decide nothing here but attention, which is one
fused op there (on the meta device it would fall apart into products of whole attention matrices).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode

from . import nf4
from .flops import partitioner_settings
from .interruption import check
from .tensor import QuantizedTensor


@dataclass(frozen=True)
class StepGraphs:
    """`backward` is None where nothing trains. `outputs`: how many of the forward's outputs the caller gets."""

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    outputs: int


def capture_step(
    gm: fx.GraphModule, inputs: Sequence[Any], activation_budget: float, inductor: bool = False
) -> StepGraphs:
    """AOTAutograd's graphs of the pipeline's result. `gm` is changed: its constants move from meta to the CPU.

    With `inductor` they are those that Inductor gets: in its decompositions, after its passes over the joint graph.
    """
    check()
    for node in gm.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _on_cpu)  # type: ignore[assignment]
        node.kwargs = fx.node.map_aggregate(node.kwargs, _on_cpu)  # type: ignore[assignment]
    gm.recompile()
    found: dict[str, Any] = {}

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        found.setdefault("inference", graph)
        return graph

    def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        check()
        if inductor:
            from torch._inductor.fx_passes.joint_graph import joint_graph_passes
            from torch._inductor.virtualized import V

            options |= {"compiler": "inductor"}
            with V.set_fake_mode(detect_fake_mode([node.meta.get("val") for node in joint.graph.nodes])):  # for dropout
                joint = joint_graph_passes(joint)
        pair = min_cut_rematerialization_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **options)
        found["step"] = StepGraphs(pair[0], pair[1], num_fwd_outputs)
        return pair

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [_fake(value) for value in inputs]
    settings = partitioner_settings(activation_budget)
    with torch._functorch.config.patch(settings) if settings else contextlib.nullcontext():
        aot_module_simplified(
            gm, fakes, fw_compiler=keep, bw_compiler=keep, partition_fn=partition, keep_inference_input_mutations=True,
            decompositions=_inductors_decompositions() if inductor else None,
        )  # fmt: skip
    return found.get("step") or StepGraphs(found["inference"], None, len(graph_outputs(found["inference"])))


def _inductors_decompositions() -> Any:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


def _fake(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, QuantizedTensor):
        data = nf4.QuantizedData(*(None if part is None else _fake(part) for part in value.data_4bit))
        return nn.Parameter(QuantizedTensor(data, value.layout_4bit), requires_grad=False)
    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake


def graph_outputs(gm: fx.GraphModule) -> list[Any]:
    """What the graph returns: nodes and constants."""
    return list(next(node for node in gm.graph.nodes if node.op == "output").args[0])
