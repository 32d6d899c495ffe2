"""Which values a plan counts where Inductor generates the kernels: graphs written out, and plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from qlora_compile.fusion import never_written
from qlora_compile.step_graphs import StepGraphs, capture_step
from qlora_compile.step_plan import plan_of

aten = torch.ops.aten
ROWS, CLASSES, WIDTH = 7, 50, 3


def _graph(run: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    return make_fx(run, tracing_mode="fake")(*inputs).graph


def _inside(graph: fx.Graph) -> list[str]:
    return [node.target._opname for node in graph.nodes if node in never_written(graph)]


def _loss(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    logits = aten.mm(x, w)
    wide = aten._to_copy(logits, dtype=torch.float32)
    shifted = aten.sub(wide, aten.amax(wide, [1], True))
    return aten.log(aten.sum(aten.exp(shifted), [1], True)), logits


def test_a_chain_between_products_is_not_written() -> None:
    x, w = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(WIDTH, CLASSES).bfloat16()
    assert _inside(_graph(_loss, x, w)) == ["_to_copy", "sub", "exp"]  # the reductions are, and so is what is returned

    def two_products(x: Tensor, w: Tensor, back: Tensor) -> Tensor:
        return aten.mm(aten.mul(aten.tanh(aten.t(aten.t(aten.mm(x, w)))), 2.0), back)

    # the product reads what stands before it, through views as well
    assert _inside(_graph(two_products, x, w, torch.randn(CLASSES, 5).bfloat16())) == ["tanh"]


@pytest.mark.parametrize("terms", [4, 5])
def test_a_later_kernel_reads_what_it_cannot_compute_again_cheaply(terms: int) -> None:
    def residual(w: Tensor, *parts: Tensor) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = aten.add(total, part)
        return aten.mul(total, aten.mm(aten.neg(total), w))  # read before the product and after it

    parts = [torch.randn(ROWS, ROWS) for _ in range(terms)]
    assert _inside(_graph(residual, torch.randn(ROWS, ROWS), *parts)) == ["add"] * 3  # the sum of five is written


def test_one_value_put_into_a_constant_is_a_comparison() -> None:
    def one_hot(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        zeros = aten.full([ROWS, CLASSES], 0.0)
        return (
            aten.sum(aten.scatter(zeros, 1, index, 1.0), [1]),
            aten.sum(aten.scatter(zeros, 1, index, values), [1]),
        )

    graph = _graph(one_hot, torch.zeros(ROWS, 1, dtype=torch.long), torch.randn(ROWS, 1))
    first, second = [node for node in graph.nodes if node.op == "call_function" and "scatter" in node.name]
    assert first in never_written(graph) and second not in never_written(graph)


def test_the_plan_counts_what_is_written() -> None:
    x, w = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(WIDTH, CLASSES).bfloat16()
    graph = make_fx(_loss, tracing_mode="fake")(x, w)
    fused, eager = (plan_of([StepGraphs(graph, None, 2)], None, fused=fused) for fused in (True, False))
    logits = ROWS * CLASSES * 2
    assert (
        fused.peak().bytes == logits + 2 * ROWS * 4
    )  # of each row its maximum and a sum, whose place its logarithm takes
    assert eager.peak().bytes >= logits + 2 * 2 * logits
    by_name = {buffer.name: buffer for buffer in fused.buffers}
    assert by_name["mm"].end == len(fused.events) - 1  # read inside the kernel that takes the sum, and returned


@pytest.mark.parametrize(("outlined", "alive"), [(False, 1), (True, 2)])
def test_a_gradient_takes_the_place_of_what_it_is_computed_from(outlined: bool, alive: int) -> None:
    def loss(x: Tensor, w: Tensor) -> tuple[Tensor]:
        y = x @ w
        return ((y * torch.sigmoid(y)).sum(),)

    inputs = [nn.Parameter(torch.randn(ROWS, WIDTH)), torch.randn(WIDTH, CLASSES)]
    step = capture_step(fx.symbolic_trace(loss), inputs, 1.0, inductor=True)
    plan = plan_of([step], None, fused=True, outlined=outlined)
    (product,) = [buffer for buffer in plan.buffers if buffer.kind == "saved"]
    top = plan.peak("backward")
    assert plan.size(product.size) == ROWS * CLASSES * 4
    large = [buffer for buffer in plan.live_at(top.event) if buffer.size == product.size]
    assert len(large) == alive  # outlined layers are kept from overwriting what the forward saved
