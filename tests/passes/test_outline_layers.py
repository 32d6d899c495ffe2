"""outline_layers: equal regions of the flat graph -> calls of one subgraph."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlora_compile.modules import adapter_parameters
from qlora_compile.passes import PIPELINE, outline_layers

H = 37
BEFORE = PIPELINE[: PIPELINE.index(outline_layers)]
# every region, however small
ALL: dict[str, Any] = {"outline_layers": True}


class Block(nn.Module):
    """norm, up [53, 37] with bias, down [37, 53], around a residual; `scale` is a constant in the graph."""

    def __init__(self, width: int = 53, scale: float = 0.5) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(H), scale
        self.up, self.down = nn.Linear(H, width), nn.Linear(width, H, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.up(self.norm(x)) * self.scale
        return x + self.down(F.silu(h).clamp(max=3.0)) * mask


class Stack(nn.Module):
    """A head that stays dense, after equal blocks that share one mask."""

    def __init__(self, *blocks: nn.Module, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between
        self.out = nn.Linear(H, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
            if self.between is not None:
                x = self.between(x)
        return self.out(torch.tanh(x))


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, H, requires_grad=True), torch.rand(5, 1)


def _regions(t: Any) -> dict[str, fx.GraphModule]:
    return {name: child for name, child in t.gm.named_children() if name.startswith("region_")}


def _same_numbers(t: Any, model: nn.Module, x: Tensor, fill: Callable[[nn.Module], None]) -> int:
    """The pass's count; output and gradients must not change by a bit: the same calls run in the same order."""
    t.run(*BEFORE)
    fill(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    count: int = t.count(outline_layers)
    for old, new in zip(before, t.numbers(*wrt), strict=True):
        assert old.abs().max() > 0
        assert torch.equal(old, new)
    return count


def test_equal_layers_become_calls_of_one_subgraph(traced: Any, fill_adapters: Any) -> None:
    model, (x, mask) = Stack(*[Block() for _ in range(4)]), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 4
    ((name, region),) = _regions(t).items()
    calls = t.nodes("call_region")
    assert [call.args[0].target for call in calls] == [name] * 4
    assert len([node for node in region.graph.nodes if "lora_linear" in str(node.target)]) == 2
    assert t.nodes("layer_norm") == t.nodes("silu") == []
    # the mask is one input of all, each weight its own; one hidden state goes from layer to layer
    operands = [call.args[2:] for call in calls]
    shared = [refs for refs in zip(*operands, strict=True) if len(set(refs)) == 1]
    assert [refs[0].name for refs in shared] == ["l_mask_"]
    assert len(operands[0]) == len(set(operands[0]))
    assert [len(call.users) for call in calls] == [1] * 4


def test_a_second_run_finds_nothing_more(traced: Any) -> None:
    model = Stack(*[Block() for _ in range(3)])
    t = traced(model, *_inputs(), **ALL)
    assert t.count(*BEFORE, outline_layers) == 3
    text = t.text()
    assert t.count(outline_layers) == 0
    assert t.text() == text


def test_no_module_is_needed(traced: Any, fill_adapters: Any) -> None:
    """A loop over parameters, written by hand."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ParameterList([nn.Parameter(torch.randn(53, H) / 6) for _ in range(4)])
            self.b = nn.ParameterList([nn.Parameter(torch.randn(53, H) / 6) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            for a, b in zip(self.a, self.b, strict=True):
                h = F.gelu(F.linear(x, a)).clamp(max=2.0).sin()
                x = x + (h @ b) * 0.5
            return x

    model, (x, _) = Loop(), _inputs()
    t = traced(model, x, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 4


def test_two_stacks_become_two_subgraphs(traced: Any, fill_adapters: Any) -> None:
    """An encoder and a decoder, with something of its own between them."""
    blocks = [Block() for _ in range(3)] + [Block(width=41) for _ in range(2)]
    model, (x, mask) = Stack(*blocks), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 5
    assert [call.args[0].target for call in t.nodes("call_region")] == ["region_0"] * 3 + ["region_1"] * 2


def test_layers_in_turns_are_one_region(traced: Any, fill_adapters: Any) -> None:
    """wide, narrow, wide, narrow: the pair repeats."""
    model, (x, mask) = Stack(*[Block(width=w) for w in (53, 41, 53, 41, 53, 41)]), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 3
    assert [len(call.args[0].users) for call in t.nodes("call_region")[:1]] == [1]


def test_what_is_used_later_is_handed_out(traced: Any, fill_adapters: Any) -> None:
    """Every layer's hidden state, and something from inside a layer that only the last one gives."""

    class States(Stack):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            states, h = [x], x
            for block in self.blocks:
                h = block.up(block.norm(x))
                x = x + block.down(F.silu(h).clamp(max=3.0)) * mask
                states.append(x)
            return torch.stack(states).sum(0).mean() + h.square().mean()

    model, (x, mask) = States(*[Block() for _ in range(3)]), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 3


def test_a_weight_of_all_layers_is_one_input(traced: Any, fill_adapters: Any) -> None:
    blocks = [Block() for _ in range(3)]
    for block in blocks[1:]:
        block.down = blocks[0].down
    model, (x, mask) = Stack(*blocks), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 3


def test_writes_inside_a_region_stay_inside(traced: Any, fill_adapters: Any) -> None:
    class Writing(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.up(self.norm(x)) * self.scale
            h.clamp_(max=3.0)
            return x + self.down(F.silu(h)) * mask

    model, (x, mask) = Stack(*[Writing() for _ in range(3)]), _inputs()
    t = traced(model, x, mask, **ALL)
    assert _same_numbers(t, model, x, fill_adapters) == 3


def test_declines_a_region_that_writes_into_its_inputs(traced: Any) -> None:
    class Counting(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask.add_(1.0)
            h = F.silu(self.up(self.norm(x))).clamp(max=3.0).sin().cos().abs().neg().exp().tanh().square()
            for _ in range(12):  # enough nodes to be worth a word
                h = h.sin().cos().tanh()
            return x + self.down(h) * mask

    t = traced(Stack(*[Counting() for _ in range(3)]), *_inputs(), **ALL)
    ((what, reason),) = t.declined(*BEFORE, outline_layers).items()
    assert "writes into an input of the region" in reason
    assert what == "blocks.0 ... blocks.2"


def test_declines_results_that_share_memory(traced: Any) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            views = []
            for block in self.blocks:
                h = block.up(block.norm(x))
                for _ in range(12):
                    h = h.sin().cos().tanh()
                x = x + block.down(h) * mask
                views += [h.view(-1), h]
            return x, *views

    t = traced(Viewing(), *_inputs(), **ALL)
    (reason,) = t.declined(*BEFORE, outline_layers).values()
    assert "shares memory" in reason


@pytest.mark.parametrize(
    "model",
    [
        Stack(*[Block(scale=0.1 * i) for i in range(1, 5)]),
        Stack(*[Block(width=40 + i) for i in range(4)]),
        Stack(Block()),
    ],
    ids=["other constants", "other shapes", "one layer"],
)
def test_layers_that_differ_stay(traced: Any, model: nn.Module) -> None:
    t = traced(model, *_inputs(), **ALL)
    assert t.declined(*BEFORE, outline_layers) == {}
    assert _regions(t) == {}


def test_modes_are_not_crossed(traced: Any) -> None:
    """A call that switches gradients off belongs to no region: only what lies between two of them may repeat."""

    class Frozen(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            with torch.no_grad():
                mask = mask.cos()
            return super().forward(x, mask)

    model, (x, mask) = Stack(*[Frozen() for _ in range(3)]), _inputs()
    t = traced(model, x, mask, **ALL)
    t.run(*BEFORE, outline_layers)
    assert all("grad" not in str(node.target) for region in _regions(t).values() for node in region.graph.nodes)


def test_false_leaves_everything_and_says_nothing(traced: Any) -> None:
    many = Stack(*[Block() for _ in range(12)])
    assert traced(many, *_inputs(), outline_layers=False).declined(*BEFORE, outline_layers) == {}


def test_auto_outlines_where_it_pays(traced: Any) -> None:
    t = traced(Stack(*[Block() for _ in range(40)]), *_inputs(), outline_layers="auto")
    assert t.count(*BEFORE, outline_layers) == 40
    assert len(_regions(t)) == 1


@pytest.mark.parametrize(
    ("layers", "options", "why"),
    [
        (12, {}, "little to save"),
        (40, {"lowering": "aot_eager"}, "lowering 'aot_eager' compiles nothing"),
    ],
)
def test_auto_leaves_the_graph_flat_and_says_what_it_would_save(
    layers: int, options: dict[str, Any], why: str, traced: Any
) -> None:
    t = traced(Stack(*[Block() for _ in range(layers)]), *_inputs(), outline_layers="auto", **options)
    ((what, reason),) = t.declined(*BEFORE, outline_layers).items()
    assert what == f"blocks.0 ... blocks.{layers - 1}"
    said = re.fullmatch(
        rf"{layers} equal regions: {why}; outline_layers=True would compile (\d+) of (\d+) nodes no more", reason
    )
    assert said is not None
    saved, total = map(int, said.groups())
    assert saved % (layers - 1) == 0
    assert 0.8 * total < saved < total
    assert _regions(t) == {}


def test_auto_says_nothing_of_a_small_graph(traced: Any) -> None:
    few = Stack(*[Block() for _ in range(4)])
    assert traced(few, *_inputs(), outline_layers="auto").declined(*BEFORE, outline_layers) == {}


def test_records_keep_each_layer_s_own_names(traced: Any) -> None:
    """The report reads on: what happens inside a call is listed after it, with that layer's modules and linears."""
    from qlora_compile.pass_manager import run_passes

    model = Stack(*[Block() for _ in range(6)])
    t = traced(model, *_inputs(), **ALL)
    result = run_passes(t.gm, t.ctx, (*BEFORE, outline_layers))
    flat, outlined = result.stages["group_linears"], result.stages["outline_layers"]
    kept = {record.name: record for record in outlined}
    assert len(kept) == len(outlined)
    sites = [record.sites for record in outlined if "lora_linear" in record.target]
    assert sites == [*((f"blocks.{i}.{name}",) for i in range(6) for name in ("up", "down")), ("out",)]
    for record in flat:
        if record.op not in ("placeholder", "output") and record.sites:
            assert kept[record.name] == record
    last = result.passes[-1]
    assert last.nodes_after < last.nodes_before == len(flat)
