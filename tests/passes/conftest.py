"""Single passes on a graph that Dynamo traced: `traced(module, *inputs)` -> a `Traced` with its graph and pass context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qlora_compile.config import QLoRAConfig
from qlora_compile.dynamo import real_inputs
from qlora_compile.fx_utils import copy_graph, placeholders
from qlora_compile.pass_manager import Pass, PassContext, PassResult, run_passes, target_name
from qlora_compile.state import ModelEdits

# fp32 everywhere, so that tolerances can be tight; blocks of 32 leave a ragged last block in these small weights.
FP32 = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5}


class Traced:
    """One traced graph (`gm`), its pass context (`ctx`) as the backend makes it, and the values to run it with."""

    def __init__(self, model: nn.Module, gm: fx.GraphModule, inputs: Sequence[Any], config: QLoRAConfig) -> None:
        self.model = model
        original = real_inputs(gm)
        self.gm = copy_graph(gm)
        nodes = placeholders(self.gm.graph)
        self.edits = ModelEdits(model, config)
        self.ctx = PassContext(config, self.edits)
        found = {node.name: self.edits.find(param) for node, param in zip(nodes, original, strict=True)}
        self.ctx.params = {name: entry for name, entry in found.items() if entry is not None}
        self.values = {node.name: value for node, value in zip(nodes, inputs, strict=True)}

    def run(self, *pipeline: Pass) -> list[PassResult]:
        """Run the passes through the manager, which does its chores around each."""
        return run_passes(self.gm, self.ctx, pipeline).passes

    def count(self, *pipeline: Pass) -> int:
        """Run the passes; the number of rewrites of the last one."""
        return self.run(*pipeline)[-1].rewrites

    def declined(self, *pipeline: Pass) -> dict[str, str]:
        """Run the passes; {what: reason} of the last one, which must not have rewritten anything."""
        last = self.run(*pipeline)[-1]
        assert last.rewrites == 0
        return dict(last.declined)

    def __call__(self, **values: Tensor) -> Any:
        """The graph's first output, with `values` in place of the inputs that it was traced with."""
        given = self.values | values | {name: ref.get() for name, ref in self.ctx.state.items()}
        return self.gm(*[given[node.name] for node in placeholders(self.gm.graph)])[0]

    def numbers(self, *wrt: Tensor) -> list[Tensor]:
        """The output, then the gradients of `wrt` for a cotangent that is random but always the same."""
        y = self()
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, wrt, cotangent)]

    def targets(self) -> list[str]:
        """Short names of the calls, in order."""
        return [self.name_of(node) for node in self.gm.graph.nodes if node.op in ("call_function", "call_method")]

    def nodes(self, target: str) -> list[fx.Node]:
        """The calls with that short name."""
        return [node for node in self.gm.graph.nodes if self.name_of(node) == target]

    @staticmethod
    def name_of(node: fx.Node) -> str:
        """`lora_linear` for `torch.ops.qlora.lora_linear.default`."""
        return target_name(node).removeprefix("qlora.")

    def text(self) -> str:
        """The graph as text, to compare two states of it."""
        return str(self.gm.graph)


def trace(module: nn.Module, *inputs: Any, **options: Any) -> Traced:
    """Trace `module(*inputs)` with Dynamo, without any pass; `options` are QLoRAConfig's fields (fp32, block 32, r 3)."""
    found: list[Traced] = []
    config = QLoRAConfig.from_options(FP32 | options)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(Traced(module, gm, example_inputs, config))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def traced() -> Iterator[Callable[..., Traced]]:
    """`trace`, with a clean Dynamo around it."""
    yield trace
    torch._dynamo.reset()


@pytest.fixture
def fill_adapters() -> Callable[[nn.Module], None]:
    """Give every adapter a B that is not zero, and a weight that is not one: otherwise half of the formula is untested."""

    def fill(model: nn.Module) -> None:
        from qlora_compile.modules import adapter_sites

        generator = torch.Generator().manual_seed(11)
        for site in adapter_sites(model).values():
            for name in site.adapters:
                with torch.no_grad():
                    site.b(name).normal_(std=0.3, generator=generator)
                    site.adapter_weight(name).fill_(0.7)

    return fill
