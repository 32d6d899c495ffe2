"""Two hundred steps of random batch sizes and sequence lengths cost three compilations, whatever the door."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import qlora_compile as qc
from qlora_compile.modules import adapter_parameters, adapter_sites

CONFIG: dict[str, Any] = {"compute_dtype": "float32", "block_size": 32, "r": 3, "lora_alpha": 5}
# fp32 sums of at most 80 terms of size 1, added in another order
TIGHT: dict[str, float] = {"atol": 5e-5, "rtol": 5e-5}


def step(model: nn.Module, call: Any, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Forward and backward -> the adapters' gradients, taken away from them."""
    tokens = torch.randint(3, 211, shape, generator=torch.Generator().manual_seed(shape[0] * 100 + shape[1]))
    call(input_ids=tokens, labels=tokens).loss.backward()
    grads = [param.grad for param in adapter_parameters(model) if param.grad is not None]
    model.zero_grad()
    return grads


@pytest.mark.parametrize("outline", [True, False])
@pytest.mark.parametrize("door", ["plain", "prepared"])
def test_one_graph_for_the_first_shape_one_for_all_others_one_for_a_batch_of_one(
    tiny_llama: Callable[..., nn.Module], door: str, outline: bool
) -> None:
    """Lengths start at 2: one of 1 is a size of 1 again. The numbers of the last graphs are checked, on shapes that
    they were not traced with."""
    model = tiny_llama(num_hidden_layers=2)
    if door == "prepared":
        qc.prepare(model, CONFIG)
    options = CONFIG | {"lowering": "aot_eager", "outline_layers": outline}
    compiled = torch.compile(model, backend="qlora", fullgraph=True, options=options)
    draw = random.Random(3)
    shapes = [(draw.randint(1, 6), draw.randint(2, 24)) for _ in range(200)]
    assert {batch for batch, _ in shapes} == set(range(1, 7))
    graphs, backwards = [], []
    for shape in shapes:
        before = counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]
        step(model, compiled, shape)
        graphs.append(counters["stats"]["unique_graphs"] - before[0])
        backwards.append(counters["aot_autograd"]["total"] - before[1])
    assert sum(graphs) == 3
    assert sum(backwards) == 3
    assert sum(graphs[20:]) == 0
    calls = [record.target for record in qc.explain(model).stages["outline_layers"]]
    assert calls.count("call_region") == (2 if outline else 0)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for site in adapter_sites(model).values():
            site.b().normal_(std=0.3, generator=generator)
    for shape in [(3, 31), (1, 29)]:
        grads, expected = step(model, compiled, shape), step(model, model, shape)
        assert len(grads) == 2 * 7 * 2
        for mine, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, theirs, **TIGHT)
