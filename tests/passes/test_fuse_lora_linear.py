"""fuse_lora_linear: dequantize + linear + adapters -> one lora_linear op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.modules import adapter_parameters
from qlora_compile.passes import fuse_lora_linear, insert_adapters, match_lora, normalize_linear, quantize_weights

OUT, IN, R = 21, 37, 3
BEFORE = (normalize_linear, match_lora, quantize_weights, insert_adapters)
FUSED = ["lora_linear", "getitem"]


@pytest.mark.parametrize("x_shape", [(2, 5, IN), (7, IN), (IN,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"quantize": False}, {"quant_type": "fp4"}], ids=str)
def test_one_op_with_the_same_numbers(
    traced: Callable[..., Any],
    fill_adapters: Callable[[nn.Module], None],
    x_shape: tuple[int, ...],
    bias: bool,
    options: dict[str, Any],
) -> None:
    model = nn.Linear(IN, OUT, bias=bias)
    x = torch.randn(*x_shape[:-1], x_shape[-1] * 2)[..., ::2].requires_grad_()
    assert len(x_shape) == 1 or not x.is_contiguous()
    t = traced(model, x, **options)
    t.run(*BEFORE)
    fill_adapters(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    assert t.count(fuse_lora_linear) == 1
    assert t.targets() == FUSED
    assert t.nodes("lora_linear")[0].meta["qlora_sites"] == ("",)
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        # fp32 sums of 37 terms of size 1 in another order (the scaling is applied to h, A and W are one product for dx)
        torch.testing.assert_close(now, was, atol=3e-5, rtol=3e-5)


def test_conv1d_becomes_one_op(traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]) -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = Conv1D(OUT, IN), torch.randn(2, 5, IN, requires_grad=True)
    t = traced(model, x)
    t.run(*BEFORE)
    fill_adapters(model)
    wrt = [x, *adapter_parameters(model)]
    before = t.numbers(*wrt)
    assert t.count(fuse_lora_linear) == 1
    assert t.targets().count("lora_linear") == 1
    assert "linear" not in t.targets()
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=3e-5, rtol=3e-5)  # as above


def test_without_adapters_the_quantized_product_is_fused(traced: Callable[..., Any]) -> None:
    x = torch.randn(7, IN, requires_grad=True)
    t = traced(nn.Linear(IN, OUT), x, r=0)
    t.run(*BEFORE)
    before = t.numbers(x)
    assert t.count(fuse_lora_linear) == 1
    assert t.targets() == FUSED
    assert t.nodes("lora_linear")[0].args[6] == []
    for was, now in zip(before, t.numbers(x), strict=True):
        torch.testing.assert_close(now, was, atol=3e-5, rtol=3e-5)  # another summation order in fp32


def test_twice_is_the_same_as_once(traced: Callable[..., Any]) -> None:
    t = traced(nn.Linear(IN, OUT), torch.randn(7, IN))
    t.run(*BEFORE, fuse_lora_linear)
    once = t.text()
    assert t.count(fuse_lora_linear) == 0
    assert t.text() == once


def test_a_dense_linear_without_adapters_is_left_alone(traced: Callable[..., Any]) -> None:
    t = traced(nn.Linear(IN, OUT), torch.randn(7, IN), target_modules=["q"])
    t.run(*BEFORE)
    before = t.text()
    assert t.declined(fuse_lora_linear) == {}
    assert t.text() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_casts_around_the_product_are_the_op_s_own(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None], dtype: torch.dtype
) -> None:
    """x.to(bf16) -> product -> .to(x.dtype): the op casts by itself, so x is not held twice for backward."""
    model, x = nn.Linear(IN, OUT).to(dtype), torch.randn(2, 5, IN, dtype=dtype)
    t = traced(model, x, compute_dtype="bfloat16")
    t.run(*BEFORE)
    fill_adapters(model)
    before = t()
    assert t.count(fuse_lora_linear) == 1
    (op,) = t.nodes("lora_linear")
    assert op.args[0].op == "placeholder"
    after = t()
    assert after.dtype == dtype
    # bf16 keeps 8 bits: the op adds the adapter into the product before it rounds, the graph rounds both first
    torch.testing.assert_close(after.float(), before.float(), atol=0.05, rtol=2**-6)


@pytest.mark.parametrize(
    "cast",
    [lambda x: x.bfloat16().float(), lambda x: (x * 9).to(torch.int32).float(), lambda x: x.float()],
    ids=["bf16", "int32", "none"],
)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_rounding_that_the_user_asked_for_stays(
    traced: Callable[..., Any], cast: Callable[[Tensor], Tensor], x_dtype: torch.dtype
) -> None:
    """The op may do the cast to the compute dtype by itself, but neither lose bits in the result nor keep lost ones."""
    model = OwnLora(lambda m, x: m.base(cast(x)))
    t = traced(model, torch.randn(7, IN).to(x_dtype), **OWN_OPTIONS)
    t.run(*BEFORE)
    before = t()
    assert t.count(fuse_lora_linear) == 1
    torch.testing.assert_close(t(), before, atol=3e-5, rtol=3e-5)  # another summation order in fp32, not 2**-8


class OwnLora(nn.Module):
    """A user's own adapter code around a linear `base` that is quantized: `use(module, x)` is the forward."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT)
        self.a, self.b = nn.Parameter(torch.randn(R, IN) * 0.3), nn.Parameter(torch.randn(OUT, R) * 0.3)
        self.a2, self.b2 = nn.Parameter(torch.randn(5, IN) * 0.3), nn.Parameter(torch.randn(OUT, 5) * 0.3)
        self.gate = nn.Parameter(torch.randn(1, R))
        self.register_buffer("s", torch.tensor(0.6))
        self.register_buffer("s2", torch.tensor(1.4))
        self.register_buffer("vector", torch.randn(OUT))
        self.use = use

    def up(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return F.linear(F.linear(x, self.a if a is None else a), self.b if b is None else b)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


OWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "number": (lambda m, x: m.base(x) + m.up(x) * 0.5, 1),
    "no scale": (lambda m, x: m.base(x) + m.up(x), 1),
    "number and tensor": (lambda m, x: m.base(x) + m.up(x) * 0.5 * m.s, 1),
    "from the left": (lambda m, x: m.up(x) * 0.5 + m.base(x), 1),
    "torch.add and torch.mul": (lambda m, x: torch.add(m.base(x), torch.mul(m.up(x), 0.5)), 1),
    "method add and mul": (lambda m, x: m.base(x).add(m.up(x).mul(m.s)), 1),
    "two": (lambda m, x: m.base(x) + m.up(x) * 0.5 + m.up(x, m.a2, m.b2) * 2, 2),
    "the same dropout": (lambda m, x: m.base(x) + m.up(F.dropout(x, 0.3, training=False)), 1),
    "a tensor for one of two": (lambda m, x: m.base(x) + m.up(x) * m.s + m.up(x, m.a2, m.b2) * 0.5, 2),
}
NOT_A_BRANCH: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another input": lambda m, x: m.base(x) + m.up(x.roll(1)),
    "weight of one output": lambda m, x: m.base(x) + F.linear(F.linear(x, m.a), m.gate),
    "alpha of add": lambda m, x: torch.add(m.base(x), m.up(x), alpha=2),
    "a difference": lambda m, x: m.base(x) - m.up(x),
    "scaled by a vector": lambda m, x: m.base(x) + m.up(x) * m.vector,
    "its value is used twice": lambda m, x: (lambda u: m.base(x) + u + u.sin())(m.up(x)),
    "the low-rank value is used": lambda m, x: (lambda h: m.base(x) + F.linear(h, m.b) + h.sum(dim=-1, keepdim=True))(
        F.linear(x, m.a)
    ),
    "the base is used twice": lambda m, x: (lambda y: y + m.up(x) + y.sin())(m.base(x)),
    "A is computed": lambda m, x: m.base(x) + m.up(x, m.a * 2),
    "a bias in the branch": lambda m, x: m.base(x) + F.linear(F.linear(x, m.a), m.b, m.vector),
    "one layer only": lambda m, x: m.base(x) + F.linear(x, m.b @ m.a),
    "added to itself": lambda m, x: (lambda y: y + y)(m.base(x)),
    "nonlinear": lambda m, x: m.base(x) + F.linear(F.relu(F.linear(x, m.a)), m.b),
}
OWN_OPTIONS = {"target_modules": ["base"], "r": 0}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_adapters_written_by_hand_are_found(traced: Callable[..., Any], name: str, quantize: bool) -> None:
    use, adapters = OWN[name]
    model, x = OwnLora(use), torch.randn(2, 5, IN, requires_grad=True)
    t = traced(model, x, quantize=quantize, **OWN_OPTIONS)
    t.run(*BEFORE)
    wrt = [x, model.a, model.b]
    before = t.numbers(*wrt)
    assert t.count(fuse_lora_linear) == 1
    assert "linear" not in t.targets()
    (op,) = t.nodes("lora_linear")
    assert list(op.args[10]) == [adapters]
    for was, now in zip(before, t.numbers(*wrt), strict=True):
        torch.testing.assert_close(now, was, atol=3e-5, rtol=3e-5)  # another summation order in fp32


@pytest.mark.parametrize("name", NOT_A_BRANCH)
def test_what_only_looks_like_a_branch_stays_beside_the_op(traced: Callable[..., Any], name: str) -> None:
    model, x = OwnLora(NOT_A_BRANCH[name]), torch.randn(2, 5, IN, requires_grad=True)
    t = traced(model, x, **OWN_OPTIONS)
    t.run(*BEFORE)
    before = t.numbers(x)
    assert t.count(fuse_lora_linear) == 1  # the quantized base alone
    assert t.nodes("lora_linear")[0].args[6] == []
    for was, now in zip(before, t.numbers(x), strict=True):
        torch.testing.assert_close(now, was, atol=5e-5, rtol=5e-5)  # another summation order in fp32


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (
            lambda m, x: m.base(x) + m.up(F.dropout(x, 0.1, True)) + m.up(F.dropout(x, 0.2, True), m.a2, m.b2),
            "its adapters drop with different probabilities",
        ),
        (lambda m, x: m.base(x) + m.up(x) * m.s * m.s2, "an adapter is scaled by more than one tensor"),
        (
            lambda m, x: m.base(x) + m.up(x) * m.s.sin(),
            "an adapter is scaled by a tensor that trains or is computed",
        ),
        (
            lambda m, x: (lambda y: (x.mul_(2), y + m.up(x))[1])(m.base(x)),
            "something between it and its adapters may write into their input",
        ),
    ],
    ids=["dropout", "two tensors", "a computed scale", "a write"],
)
def test_each_guard_declines_with_its_reason(
    traced: Callable[..., Any], use: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    model, x = OwnLora(use), torch.randn(7, IN)
    t = traced(model, x, **OWN_OPTIONS)
    t.run(*BEFORE)
    before = t.text()
    assert t.declined(fuse_lora_linear) == {"base": reason}
    assert t.text() == before


def test_a_bias_that_trains_gets_its_gradient(traced: Callable[..., Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)), peft.LoraConfig(r=R, target_modules=["0"], bias="lora_only")
    )
    bias = model.base_model.model[0].base_layer.bias
    assert bias.requires_grad
    t = traced(model, torch.randn(2, 5, IN))
    t.run(*BEFORE)
    before = t.numbers(bias)
    assert t.count(fuse_lora_linear) == 1
    for was, now in zip(before, t.numbers(bias), strict=True):
        torch.testing.assert_close(now, was, atol=3e-5, rtol=3e-5)  # another summation order in fp32


def test_dropout_is_drawn_from_a_seed_for_each_call(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    model, x = nn.Linear(IN, OUT), torch.randn(7, IN, requires_grad=True)
    t = traced(model, x, lora_dropout=0.25)
    t.run(*BEFORE)
    fill_adapters(model)
    assert t.count(fuse_lora_linear) == 1
    assert t.targets() == ["randint", *FUSED]
    (op,) = t.nodes("lora_linear")
    assert op.args[12] == 0.25
    assert [seed.target for seed in op.args[11]] == [torch.randint]
    torch.manual_seed(3)
    first, second = t(), t()
    torch.manual_seed(3)
    torch.testing.assert_close(t(), first, atol=0, rtol=0)
    assert not torch.equal(first, second)


def test_the_mean_over_seeds_is_the_result_without_dropout(
    traced: Callable[..., Any], fill_adapters: Callable[[nn.Module], None]
) -> None:
    model, x = nn.Linear(IN, OUT), torch.randn(7, IN)
    t = traced(model, x, lora_dropout=0.25)
    t.run(*BEFORE, fuse_lora_linear)
    fill_adapters(model)
    draws = torch.stack([t().detach() for _ in range(400)])
    error = draws.mean(0) - model.eval()(x)
    # the standard error of the mean at each element; 147 elements, so 5 of them is one chance in 10,000
    assert (error.abs() < 5 * draws.std(0) / 400**0.5 + 1e-5).all()
    assert draws.std(0).min() > 0


def test_the_fused_op_keeps_module_stack_source_and_site(traced: Callable[..., Any]) -> None:
    t = traced(nn.Sequential(nn.Linear(IN, OUT)), torch.randn(7, IN))
    (linear,) = t.nodes("linear")
    stack, trace = linear.meta["nn_module_stack"], linear.meta["stack_trace"]
    t.run(*BEFORE, fuse_lora_linear)
    (op,) = t.nodes("lora_linear")
    assert op.meta["nn_module_stack"] == stack
    assert op.meta["stack_trace"] == trace
    assert op.meta["qlora_sites"] == ("0",)
    assert op.meta["qlora_made_by"][-1] == "fuse_lora_linear"


GOLDEN = """\
state_l_codes, state_l_absmax, state_l_absmax_scale, state_l_absmax_offset, state_l_lora_a, state_l_lora_b, \
state_l_lora_weight = state
lora_linear(l_x_, [state_l_codes], [state_l_absmax], [state_l_absmax_scale], [state_l_absmax_offset], \
[l_self_modules_l_parameters_bias_], [state_l_lora_a], [state_l_lora_b], [state_l_lora_weight], [2.0], [1], [], 0.0, \
[21], nf4, 32, torch.float32)
getitem(lora_linear_default, 0)
silu(getitem)
"""


def test_the_whole_graph_as_text(traced: Callable[..., Any]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(IN, OUT)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.l(x))

    t = traced(Layer(), torch.randn(7, IN), lora_alpha=6)
    t.run(*BEFORE, fuse_lora_linear)
    lines = [", ".join(t.ctx.state) + " = state"]
    for node in t.gm.graph.nodes:
        if node.op == "call_function":
            lines.append(f"{t.name_of(node)}({', '.join(map(str, node.args))})")
    assert "\n".join(lines) + "\n" == GOLDEN


def test_a_weight_that_trains_declines(traced: Callable[..., Any]) -> None:
    """A PEFT model whose base the user unfroze: nothing is quantized, and dW is not the op's to give."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), peft.LoraConfig(r=R, target_modules=["0"]))
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    t = traced(model, torch.randn(7, IN))
    t.run(*BEFORE)
    assert t.declined(fuse_lora_linear) == {"base_model.model.0": "its weight trains or is computed"}


def test_double_precision_declines(traced: Callable[..., Any]) -> None:
    model = OwnLora(lambda m, x: m.base(x) + m.up(x)).double()
    t = traced(model, torch.randn(7, IN).double(), **OWN_OPTIONS)
    t.run(*BEFORE)
    assert t.declined(fuse_lora_linear) == {"base": "its input is torch.float64"}
