"""group_linears: lora_linear ops that share their input -> one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.modules import adapter_parameters
from qlora_compile.passes import PIPELINE, group_linears

IN = 37
BEFORE = PIPELINE[: PIPELINE.index(group_linears)]


class Attention(nn.Module):
    """q [21, 37], k and v [10, 37] over one x; biases where they are asked for. `use(q, k, v, module, x)` combines."""

    def __init__(self, use: Callable[..., Tensor] | None = None, bias: tuple[bool, ...] = (False,) * 3) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(IN, n, bias=b) for n, b in zip((21, 10, 10), bias, strict=True))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        if self.use is not None:
            return self.use(self, x)
        return torch.cat([self.q(x), torch.sigmoid(self.k(x)) * self.v(x)], dim=-1)


def _members(t: Any) -> list[tuple[str, ...]]:
    return [node.meta["qlora_sites"] for node in t.nodes("lora_linear")]


@pytest.mark.parametrize("x_shape", [(2, 5, IN), (7, IN)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"quantize": False}, {"r": 0}, {"rank_pattern": {"k": 5}}],
    ids=["nf4", "single scales", "dense", "no adapters", "different ranks"],
)
def test_linears_on_one_input_become_one_op(
    traced: Callable[..., Any],
    fill_adapters: Callable[[nn.Module], None],
    x_shape: tuple[int, ...],
    bias: bool,
    options: dict[str, Any],
) -> None:
    model, x = Attention(bias=(bias,) * 3), torch.randn(x_shape, requires_grad=True)
    t = traced(model, x, **options)
    t.run(*BEFORE)
    fill_adapters(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    assert _members(t) == [("q",), ("k",), ("v",)]
    assert t.count(group_linears) == 1
    assert _members(t) == [("q", "k", "v")]
    assert t.targets().count("getitem") == 3
    assert list(t.nodes("lora_linear")[0].args[13]) == [21, 10, 10]
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        # fp32: dx is one sum of 41 products where it was three sums that autograd added
        torch.testing.assert_close(now, was, atol=5e-5, rtol=5e-5)


def test_twice_is_the_same_as_once(traced: Callable[..., Any]) -> None:
    t = traced(Attention(), torch.randn(7, IN))
    t.run(*BEFORE, group_linears)
    once = t.text()
    assert t.count(group_linears) == 0
    assert t.text() == once


def test_a_chain_is_left_alone(traced: Callable[..., Any]) -> None:
    t = traced(nn.Sequential(nn.Linear(IN, 21), nn.SiLU(), nn.Linear(21, IN)), torch.randn(7, IN))
    t.run(*BEFORE)
    before = t.text()
    assert t.declined(group_linears) == {}
    assert t.text() == before


def test_other_inputs_make_other_groups(traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]) -> None:
    """Cross attention: q from x, k and v from another tensor."""
    model = Attention(lambda m, x: torch.cat([m.q(x), m.k(x.flip(0)), m.v(x.flip(0) * 1)], dim=-1))
    t = traced(model, torch.randn(7, IN))
    t.run(*BEFORE)
    assert t.count(group_linears) == 0
    model = Attention(lambda m, x: (lambda z: torch.cat([m.q(x), m.k(z), m.v(z)], dim=-1))(x.flip(0)))
    t = traced(model, torch.randn(7, IN))
    t.run(*BEFORE)
    fill_adapters(model)
    before = t()
    assert t.count(group_linears) == 1
    assert _members(t) == [("q",), ("k", "v")]
    torch.testing.assert_close(t(), before, atol=5e-5, rtol=5e-5)  # another summation order in fp32


UNEQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a bias in one": ({"bias": (True, False, False)}, {}),
    "an adapter in two": ({}, {"rank_pattern": {"q": 0}}),
    "four bits in two": ({}, {"exclude_modules": ["q"]}),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_members_must_have_the_same_parts(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None], name: str
) -> None:
    given, options = UNEQUAL[name]
    model, x = Attention(**given), torch.randn(2, 5, IN, requires_grad=True)
    t = traced(model, x, **options)
    t.run(*BEFORE)
    fill_adapters(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    assert t.count(group_linears) == 1
    assert _members(t)[-1] == ("k", "v")
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=5e-5, rtol=5e-5)  # another summation order in fp32


def test_the_first_member_s_place_holds_for_all(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    """k and v stand after code that uses q: they move up."""
    model = Attention(lambda m, x: (lambda q: torch.cat([q.tanh() * m.k(x).sum(), m.v(x)], dim=-1))(m.q(x)))
    x = torch.randn(2, 5, IN)
    t = traced(model, x)
    t.run(*BEFORE)
    fill_adapters(model)
    before = t()
    assert t.count(group_linears) == 1
    torch.testing.assert_close(t(), before, atol=5e-4, rtol=5e-5)  # a sum of 100 values; another order in fp32


def test_each_member_of_a_shared_weight_counts(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    """The same module called twice on the same x: twice in the group, and gradients add up."""
    model = Attention(lambda m, x: m.q(x) * m.q(x).sigmoid())
    x = torch.randn(7, IN, requires_grad=True)
    t = traced(model, x)
    t.run(*BEFORE)
    fill_adapters(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    assert t.count(group_linears) == 1
    assert _members(t) == [("q", "q")]
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=5e-5, rtol=5e-5)  # another summation order in fp32


def test_an_input_that_comes_late_declines(traced: Callable[..., Any]) -> None:
    """An adapter A that another op made after the first member; only a graph made by hand has one."""
    model, x = Attention(bias=(False,) * 3), torch.randn(7, IN)
    t = traced(model, x)
    t.run(*BEFORE)
    op = t.nodes("lora_linear")[1]
    (late,) = op.args[6]
    with t.gm.graph.inserting_before(op):
        computed = t.gm.graph.call_function(torch.neg, (late,))
    computed.meta["example_value"] = late.meta["example_value"]
    op.update_arg(6, [computed])
    before = t()
    result = t.run(group_linears)[-1]
    assert result.rewrites == 1
    assert result.declined == (("k", "an input of it is computed after the first member"),)
    assert _members(t) == [("q", "v"), ("k",)]
    torch.testing.assert_close(t(), before, atol=5e-5, rtol=5e-5)  # another summation order in fp32


def _write_between(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def use(m: Any, given: Tensor) -> Tensor:
        x = given * 1
        q = m.q(x)
        write(x, q)
        return torch.cat([q, m.k(x), m.v(x)], dim=-1)

    return use


@pytest.mark.parametrize(
    "write",
    [
        lambda x, q: x.mul_(2),
        lambda x, q: F.relu(x, inplace=True),
        lambda x, q: x.view(-1)[3:].fill_(1),
        lambda x, q: x.__setitem__(0, 1.0),
        lambda x, q: torch.add(x[1], x[2], out=x[0]),
    ],
    ids=["mul_", "relu inplace", "a view of it", "setitem", "out="],
)
def test_a_write_into_the_input_declines(traced: Callable[..., Any], write: Callable[[Tensor, Tensor], Any]) -> None:
    model = Attention(_write_between(write))
    x = torch.randn(7, IN)
    with torch.no_grad():
        t = traced(model, x)
        t.run(*BEFORE)
        before = t()
        result = t.run(group_linears)[-1]
        reason = "something between it and the first member may write into their input"
        assert result.declined == (("k", reason), ("v", reason))
        torch.testing.assert_close(t(), before, atol=0, rtol=0)
        torch.testing.assert_close(t(), model(x), atol=5e-5, rtol=5e-5)  # another summation order in fp32


def test_a_write_into_a_result_does_not_hinder(traced: Callable[..., Any]) -> None:
    """act(gate(x)) * up(x) with an activation in place."""
    t = traced(Attention(_write_between(lambda x, q: F.silu(q, inplace=True))), torch.randn(7, IN))
    t.run(*BEFORE)
    before = t()
    assert t.count(group_linears) == 1
    torch.testing.assert_close(t(), before, atol=5e-5, rtol=5e-5)  # another summation order in fp32


def test_dropout_seeds_move_up_with_their_op(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    model, x = Attention(), torch.randn(7, IN)
    t = traced(model, x, lora_dropout=0.25)
    t.run(*BEFORE)
    assert t.count(group_linears) == 1
    fill_adapters(model)
    (op,) = t.nodes("lora_linear")
    assert len({seed.name for seed in op.args[11]}) == 3
    assert t.targets()[:3] == ["randint"] * 3
    torch.manual_seed(3)
    first = t()
    assert not torch.equal(t(), first)
    torch.manual_seed(3)
    torch.testing.assert_close(t(), first, atol=0, rtol=0)
    model.eval()
    draws = torch.stack([t().detach() for _ in range(300)])
    # q is linear in its adapter: five standard errors of the mean over 7 x 21 elements
    error = (draws.mean(0) - model(x))[:, :21]
    assert (error.abs() < 5 * draws.std(0)[:, :21] / 300**0.5 + 1e-5).all()


def test_groups_in_two_layers_stay_apart(traced: Callable[..., Any]) -> None:
    t = traced(nn.Sequential(Attention(), nn.Linear(31, IN), Attention()), torch.randn(7, IN))
    t.run(*BEFORE)
    assert t.count(group_linears) == 2
    assert _members(t) == [("0.q", "0.k", "0.v"), ("1",), ("2.q", "2.k", "2.v")]


def test_a_result_that_is_used_twice(traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]) -> None:
    model = Attention(lambda m, x: F.pad(m.k(x), (0, 11)) + (lambda q: q * q.sigmoid())(m.q(x)))
    t = traced(model, torch.randn(7, IN))
    t.run(*BEFORE)
    fill_adapters(model)
    before = t()
    assert t.count(group_linears) == 1
    torch.testing.assert_close(t(), before, atol=5e-5, rtol=5e-5)  # another summation order in fp32


@pytest.mark.parametrize(
    ("model_dtype", "compute"), [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("bias", [True, False])
def test_casts_do_not_keep_members_apart(
    traced: Callable[..., Any], model_dtype: str, compute: str, bias: bool
) -> None:
    """Each member was traced with casts of its own; a retrace of QLoRALinear has casts of its own, too."""
    model, x = (
        Attention(bias=(bias,) * 3).to(getattr(torch, model_dtype)),
        torch.randn(2, 5, IN).to(getattr(torch, model_dtype)),
    )
    for _ in range(2):
        t = traced(model, x, compute_dtype=compute)
        t.run(*BEFORE)
        before = t()
        assert t.count(group_linears) == 1
        assert t().dtype == x.dtype
        torch.testing.assert_close(t(), before, atol=0.02, rtol=2**-7)  # bf16 rounds to 8 bits
