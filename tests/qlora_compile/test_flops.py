"""Formulas of our ops against torch's counts of the same products, and what the partitioner makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import qlora_compile as qc
from qlora_compile import flops


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_compiled_step_counts_as_many_flops_as_an_eager_one(tiny_llama: Callable[..., nn.Module]) -> None:
    """Without the head, whose products the compiled loss computes once more for its gradient in forward."""
    ids = torch.randint(3, 211, (2, 13))

    def step(compile_it: bool) -> Callable[[], None]:
        model = qc.prepare(tiny_llama(num_hidden_layers=2), {"r": 3, "compute_dtype": "float32"}).train()
        run = torch.compile(model.model, backend="qlora", options={"lowering": "aot_eager"})  # type: ignore[arg-type]
        run = run if compile_it else model.model  # type: ignore[assignment]
        return lambda: run(input_ids=ids).last_hidden_state.square().sum().backward()

    compiled = step(True)
    compiled()
    eager, fused = count(step(False)), count(compiled)
    # a group has one product for dX of all its linears and adapters: the same multiply-adds as one for each
    assert eager > 0 and fused == pytest.approx(eager, rel=0.02)


def test_a_budget_keeps_what_is_dear_to_compute(tiny_llama: Callable[..., nn.Module]) -> None:
    """Keeping four tenths must not cost all products again: a partitioner that takes our ops for free does that."""
    model = tiny_llama(hidden_size=96, intermediate_size=160).to("meta")
    ids = torch.randint(3, 211, (2, 61))
    plans = {}
    for budget in (1.0, 0.4, 0.0):
        found = qc.trace(model, {"input_ids": ids, "labels": ids}, {"r": 3, "activation_budget": budget})
        assert found.plan is not None
        plans[budget] = found.plan
    kept = {budget: plan.saved_bytes() for budget, plan in plans.items()}
    again = {budget: plan.flops("backward") - plans[1.0].flops("backward") for budget, plan in plans.items()}
    # a budget is of what is kept beyond the graph's inputs, so nothing is saved at 0 but what cannot be computed again
    assert kept[0.0] < kept[0.4] <= 0.45 * kept[1.0]
    assert 0 < again[0.4] < 0.6 * again[0.0], again


def test_attention_is_counted_by_queries_and_keys() -> None:
    q, k = torch.randn(2, 3, 7, 18), torch.randn(2, 3, 11, 18)
    found = count(lambda: torch.ops.qlora.attention(q, k, k, None, False, 0.2, "fp32"))
    assert found == 2 * 2 * (2 * 3) * 7 * 11 * 18


def test_symbolic_sizes_are_counted_without_a_guard() -> None:
    def products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.qlora.attention(x @ w, x @ w, x, None, False, 0.2, "fp32")[0] @ w

    shapes = (torch.randn(2, 3, 7, 18), torch.randn(18, 18))
    gm = make_fx(products, tracing_mode="symbolic")(*shapes)
    environment = next(iter(gm.graph.nodes)).meta["val"].shape[0].node.shape_env
    before = len(environment.guards)
    found = sum(map(flops.node_flops, gm.graph.nodes))
    assert found == count(lambda: products(*shapes)) > 0
    assert len(environment.guards) == before
