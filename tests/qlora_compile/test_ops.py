"""The `qlora::` ops: opcheck, and forward and gradients against a dense fp64 reference written out here.

M tokens, N output features, K input features, R rank. Every B is random, so every term counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qlora_compile import lora_group, nf4
from qlora_compile.tensor import quantize_4bit

# Seeds may not make gradients equal by chance; schemas, fakes and autograd registrations are the same for all cases.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclass(frozen=True)
class Case:
    """One call of `lora_linear`: sizes of a group, its adapters' ranks by linear, and how the weight is stored."""

    shape: tuple[int, ...] = (5, 45)
    out_features: tuple[int, ...] = (29, 18, 7)
    ranks: tuple[tuple[int, ...], ...] = ((3,), (2,), (4,))
    quant_type: str = "nf4"
    block_size: int = 32
    double_quant: bool = True
    bias: bool = True
    scaling: bool = True
    dropout: float = 0.0
    x_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    grad_x: bool = True
    grad_adapters: bool = True
    grad_bias: bool = False
    contiguous: bool = True
    seed: int = 0


def lists_of(case: Case) -> dict[str, Any]:
    """The op's arguments by name, freshly drawn."""
    generator = torch.Generator().manual_seed(case.seed)
    k = case.shape[-1]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = randn(*case.shape) if case.contiguous else randn(*case.shape[:-1], 2 * k)[..., ::2]
    given: dict[str, Any] = {"x": x.to(case.x_dtype).requires_grad_(case.grad_x)}
    if not case.contiguous:
        assert not given["x"].is_contiguous()
    dense = [randn(n, k) for n in case.out_features]
    parts = ("weight", "absmax", "absmax_scale", "absmax_offset")
    given |= {name: [] for name in parts}
    for weight in dense:
        if case.quant_type == "none":
            given["weight"].append(weight)
            continue
        options = {"quant_type": case.quant_type, "block_size": case.block_size, "double_quant": case.double_quant}
        for name, part in zip(parts, quantize_4bit(weight, **options).data_4bit, strict=True):
            given[name] += [] if part is None else [part]
    flat = [(n, r) for n, ranks in zip(case.out_features, case.ranks, strict=True) for r in ranks]
    given["bias"] = [randn(n).requires_grad_(case.grad_bias) for n in case.out_features] if case.bias else []
    given["lora_a"] = [randn(r, k).requires_grad_(case.grad_adapters) for _, r in flat]
    given["lora_b"] = [randn(n, r).requires_grad_(case.grad_adapters) for n, r in flat]
    given["scaling"] = [torch.tensor(0.6 + 0.3 * j) for j in range(len(flat))] if case.scaling else []
    given["alpha"] = [1.5 - 0.25 * j for j in range(len(flat))]
    given["adapters"] = [len(ranks) for ranks in case.ranks]
    given["seed"] = [torch.tensor(100 + j) for j in range(len(flat))] if case.dropout else []
    given |= {"dropout": case.dropout, "out_features": list(case.out_features)}
    given |= {"quant_type": case.quant_type, "block_size": case.block_size, "dtype": case.dtype}
    return given


def group_of(given: dict[str, Any]) -> lora_group.LoRAGroup:
    return lora_group.LoRAGroup(**{name: value for name, value in given.items() if name not in ("x", "bias")})


def dense_weights(given: dict[str, Any]) -> list[Tensor]:
    """Each W as the op's products see it, by the reference codec."""
    if given["quant_type"] == "none":
        return [w.to(given["dtype"]) for w in given["weight"]]
    out, k = [], given["x"].shape[-1]
    for i, n in enumerate(given["out_features"]):
        double = bool(given["absmax_scale"])
        scales = (given["absmax_scale"][i], given["absmax_offset"][i]) if double else (None, None)
        data = nf4.QuantizedData(given["weight"][i], given["absmax"][i], *scales)
        out.append(nf4.dequantize_reference(*data, (n, k), given["quant_type"], given["block_size"], given["dtype"]))
    return out


def reference(given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """y_i and the leaves [x, A..., B..., bias...] in fp64, dense; the same dropout masks as the op's."""
    x = given["x"].detach().double().requires_grad_()
    a = [t.detach().double().requires_grad_() for t in given["lora_a"]]
    b = [t.detach().double().requires_grad_() for t in given["lora_b"]]
    bias = [t.detach().double().requires_grad_() for t in given["bias"]]
    group, outs, j = group_of(given), [], 0
    flat = given["x"].detach().reshape(-1, x.shape[-1]).to(given["dtype"])
    for i, weight in enumerate(dense_weights(given)):
        y = x @ weight.double().t()
        if bias:
            y = y + bias[i]
        for _ in range(given["adapters"][i]):
            mask = group.mask(j, flat).double().view_as(x) if given["dropout"] else 1.0
            factor = given["alpha"][j] * (given["scaling"][j].item() if given["scaling"] else 1.0)
            y = y + (x * mask) @ a[j].t() @ b[j].t() * factor
            j += 1
        outs.append(y)
    return outs, [x, *a, *b, *bias]


def run(case: Case, *, unused: tuple[int, ...] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the op and of the reference side by side; outputs in `unused` get no gradient."""
    given = lists_of(case)
    *ours, _ = torch.ops.qlora.lora_linear(**given)
    theirs, their_leaves = reference(given)
    our_leaves = [given["x"], *given["lora_a"], *given["lora_b"], *given["bias"]]
    wanted = [i for i, leaf in enumerate(our_leaves) if leaf.requires_grad]
    cotangents = [torch.randn(y.shape, generator=torch.Generator().manual_seed(9)) for y in theirs]
    used = [i for i in range(len(theirs)) if i not in unused]
    grads = []
    for outs, leaves in ((ours, our_leaves), (theirs, their_leaves)):
        grads.append(
            torch.autograd.grad(
                [outs[i] for i in used],
                [leaves[i] for i in wanted],
                [cotangents[i].to(outs[i].dtype) for i in used],
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return [*ours, *grads[0]], [*theirs, *grads[1]]


def check(case: Case, *, unused: tuple[int, ...] = ()) -> None:
    # fp32: sums of at most 60 terms of size ~1, a few roundings deep. bf16: products round to 8 bits at each of the
    # three steps (x, h, y), and a difference of sums can lose two more: 2^-6 of the largest value
    share = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[case.dtype]
    share = max(share, 2**-7 if case.x_dtype == torch.bfloat16 else 0)
    ours, theirs = run(case, unused=unused)
    assert len(ours) == len(theirs) > len(case.out_features)
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.shape == exact.shape
        largest = float(exact.detach().abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(mine.detach().double(), exact.detach(), rtol=0, atol=share * largest)


# --- numbers ---

BASE = Case()
NUMBERS = {
    "nf4": BASE,
    "fp4": replace(BASE, quant_type="fp4", seed=1),
    "dense": replace(BASE, quant_type="none", block_size=0, seed=2),
    "single_quant": replace(BASE, double_quant=False, seed=3),
    "block_64": replace(BASE, block_size=64, seed=4),
    "no_bias": replace(BASE, bias=False, seed=5),
    "no_scaling_tensor": replace(BASE, scaling=False, seed=6),
    "one_linear": replace(BASE, out_features=(29,), ranks=((3,),), seed=7),
    "one_row": replace(BASE, shape=(1, 45), seed=8),
    "one_dimension": replace(BASE, shape=(45,), seed=9),
    "three_dimensions": replace(BASE, shape=(2, 3, 45), seed=10),
    "not_contiguous": replace(BASE, shape=(2, 3, 45), contiguous=False, seed=11),
    "even_k": replace(BASE, shape=(11, 64), block_size=64, seed=12),
    "no_adapters": replace(BASE, ranks=((), (), ()), seed=13),
    "some_adapters": replace(BASE, ranks=((3,), (), (4,)), seed=14),
    "two_adapters": replace(BASE, ranks=((3, 1), (2,), (5, 2)), seed=15),
    "dropout": replace(BASE, dropout=0.3, seed=16),
    "dropout_two_adapters": replace(BASE, dropout=0.6, shape=(2, 3, 45), ranks=((3, 1), (2,), (5, 2)), seed=17),
    "rank_above_a_size": replace(BASE, out_features=(2, 3, 4), ranks=((9,), (9,), (9,)), seed=18),
    "x_needs_none": replace(BASE, grad_x=False, seed=19),
    "adapters_frozen": replace(BASE, grad_adapters=False, seed=20),
    "bias_trains": replace(BASE, grad_bias=True, seed=28),
    "only_bias_trains": replace(BASE, grad_bias=True, grad_x=False, grad_adapters=False, seed=29),
    "bf16": replace(BASE, x_dtype=torch.bfloat16, dtype=torch.bfloat16, seed=21),
    "bf16_one_row": replace(BASE, shape=(1, 64), x_dtype=torch.bfloat16, dtype=torch.bfloat16, seed=22),
    "bf16_many_rows": replace(BASE, shape=(37, 64), x_dtype=torch.bfloat16, dtype=torch.bfloat16, seed=23),
    "fp16": replace(BASE, x_dtype=torch.float16, dtype=torch.float16, seed=24),
    "fp32_x_in_bf16": replace(BASE, dtype=torch.bfloat16, seed=25),
    "bf16_x_in_fp32": replace(BASE, x_dtype=torch.bfloat16, seed=26),
    "bf16_dropout": replace(BASE, x_dtype=torch.bfloat16, dtype=torch.bfloat16, dropout=0.3, seed=27),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_forward_and_gradients_are_the_dense_ones(name: str):
    check(NUMBERS[name])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("unused", [(0,), (1,), (0, 2)])
def test_outputs_that_get_no_gradient_count_as_zero(unused: tuple[int, ...], dropout: float):
    check(replace(BASE, dropout=dropout, seed=30), unused=unused)


@pytest.mark.parametrize("shape", [(0, 45), (2, 0, 45)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_empty_batch(shape: tuple[int, ...], dropout: float):
    ours, theirs = run(replace(BASE, shape=shape, dropout=dropout))
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.shape == exact.shape and bool((mine == 0).all())


def test_results_own_their_memory():
    """No output shares the reused buffers: a second call must not change the first one's numbers."""
    given, other = lists_of(BASE), lists_of(replace(BASE, seed=99))
    outs = torch.ops.qlora.lora_linear(**given)
    cotangents = [torch.ones_like(y) for y in outs[:-1]]
    grads = torch.autograd.grad(outs[:-1], [given["x"], *given["lora_a"], *given["lora_b"]], cotangents)
    before = [t.detach().clone() for t in (*outs, *grads)]
    later = torch.ops.qlora.lora_linear(**other)
    torch.autograd.grad(later[:-1], [other["x"], *other["lora_a"]], cotangents)
    assert all(torch.equal(old, t) for old, t in zip(before, (*outs, *grads), strict=True))


def test_h_is_the_low_rank_product_and_is_what_backward_reads():
    given = lists_of(BASE)
    h = torch.ops.qlora.lora_linear(**given)[-1]
    expected = given["x"] @ torch.cat(given["lora_a"]).t()
    assert h.shape == (5, 9)
    torch.testing.assert_close(h.detach(), expected.detach(), rtol=1e-5, atol=1e-5)  # 45 fp32 terms


def test_nothing_dense_is_saved():
    given = lists_of(replace(BASE, out_features=(290, 181, 73)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        torch.ops.qlora.lora_linear(**given)
    assert any(t.dtype == torch.uint8 for t in saved)
    assert max(t.numel() for t in saved if t.is_floating_point()) < 73 * 45


def test_scratch_is_reused_and_released():
    lora_group.release_scratch()
    torch.ops.qlora.lora_linear(**lists_of(BASE))
    (buffer,) = lora_group.SCRATCH.buffers.values()
    assert buffer.numel() == 29 * 45  # the largest of the group
    torch.ops.qlora.lora_linear(**lists_of(replace(BASE, seed=1)))
    assert next(iter(lora_group.SCRATCH.buffers.values())) is buffer
    lora_group.release_scratch()
    assert not hasattr(lora_group.SCRATCH, "buffers")


def test_scratch_that_found_no_memory_is_asked_for_again(monkeypatch: pytest.MonkeyPatch):
    lora_group.release_scratch()
    like = torch.empty(1)
    lora_group.scratch("weight", (2, 3), like, torch.float32)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty", mock.Mock(side_effect=torch.OutOfMemoryError("out of memory")))
        lora_group.scratch("weight", (4, 5), like, torch.float32)
    assert lora_group.scratch("weight", (4, 5), like, torch.float32).shape == (4, 5)


def test_scratch_off_the_cpu_is_nobodys():
    """Streams and threads do not share it, and it is free at the end of the op."""
    lora_group.release_scratch()
    with torch.inference_mode():
        found = lora_group.scratch("weight", (2, 3), torch.empty(1, device="meta"), torch.float16)
    assert found.shape == (2, 3) and found.dtype == torch.float16 and found.is_meta and not found.is_inference()
    assert not hasattr(lora_group.SCRATCH, "buffers")


def test_scratch_of_inference_mode_can_be_used_in_training():
    lora_group.release_scratch()
    with torch.inference_mode():
        torch.ops.qlora.lora_linear(**lists_of(replace(BASE, grad_x=False, grad_adapters=False)))
    check(BASE)


# --- dropout ---


def test_a_mask_is_drawn_from_its_seed_and_keeps_the_expected_share():
    group = group_of(lists_of(replace(BASE, dropout=0.3)))
    x = torch.ones(200, 450)
    masks = [group.mask(j, x) for j in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    kept = 0.7
    assert set(masks[0].unique().tolist()) == {0.0, float(torch.tensor(1.0).mul_(1 / kept))}
    share = float((masks[0] != 0).float().mean())
    # 90,000 draws: a standard deviation of sqrt(.3 * .7 / 90000) = 0.0015, five of them
    assert abs(share - kept) < 0.0077


def test_another_seed_gives_other_numbers_the_same_seed_the_same():
    given = lists_of(replace(BASE, dropout=0.5))
    first, again = (torch.ops.qlora.lora_linear(**given)[0] for _ in range(2))
    other = torch.ops.qlora.lora_linear(**(given | {"seed": [s + 1 for s in given["seed"]]}))[0]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_mask_leaves_the_global_generator_alone():
    given = lists_of(replace(BASE, dropout=0.5))
    before = torch.get_rng_state()
    torch.ops.qlora.lora_linear(**given)
    assert torch.equal(before, torch.get_rng_state())


# --- opcheck ---

CHECKED = (
    "nf4", "fp4", "dense", "single_quant", "no_bias", "no_scaling_tensor", "one_linear", "three_dimensions",
    "no_adapters", "two_adapters", "dropout", "x_needs_none", "adapters_frozen", "bias_trains", "bf16", "fp32_x_in_bf16",
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_lora_linear(name: str):
    given = lists_of(NUMBERS[name])
    torch.library.opcheck(torch.ops.qlora.lora_linear.default, tuple(given.values()), test_utils=CHECKS)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["nf4", "dense", "single_quant", "two_adapters", "dropout", "bf16"])
def test_opcheck_lora_linear_backward(name: str, needs: tuple[bool, bool]):
    given = lists_of(replace(NUMBERS[name], grad_x=False, grad_adapters=False))
    *outs, h = torch.ops.qlora.lora_linear(**given)
    rest = [value for key, value in given.items() if key not in ("x", "bias")]
    args = ([torch.randn_like(y) for y in outs], given["x"], h, *rest, *needs)
    torch.library.opcheck(torch.ops.qlora.lora_linear_backward.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_opcheck_codec(dtype: torch.dtype, double_quant: bool):
    weight = torch.randn(29, 45).to(dtype)
    args = (weight, "nf4", 64, double_quant)
    torch.library.opcheck(torch.ops.qlora.quantize_4bit.default, args, test_utils=CHECKS)
    parts = [*torch.ops.qlora.quantize_4bit(*args), None, None][:4]
    back = (*parts, (29, 45), "nf4", 64, dtype)
    torch.library.opcheck(torch.ops.qlora.dequantize_4bit.default, back, test_utils=CHECKS)


def test_opcheck_densify():
    torch.library.opcheck(torch.ops.qlora.densify.default, (torch.randn(5, 7),), test_utils=CHECKS)


def test_every_op_is_checked_here():
    names = {name.removeprefix("qlora::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("qlora::")}  # fmt: skip
    # those that other files of tests check
    elsewhere = (
        "accumulate_grad",
        "attention",
        "dequantize_experts",
        "evict_page",
        "grouped_lora_linear",
        "linear_cross_entropy",
        "prefetch_page",
        "step_page",
        "wide_",
    )
    names = {name for name in names if not name.startswith(elsewhere)}
    assert names == {"quantize_4bit", "dequantize_4bit", "densify", "lora_linear", "lora_linear_backward"}


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_young_adapter_adds_to_16_bits_is_not_lost(bias: bool) -> None:
    """About an eighth of a unit in y's last place, of which rounding noise may hide single values, but not the sum."""
    given = lists_of(Case(shape=(160, 45), bias=bias, x_dtype=torch.bfloat16, dtype=torch.bfloat16))
    given["lora_b"] = [b.detach() * 4e-4 for b in given["lora_b"]]
    exact, _ = reference(given)
    alone, _ = reference({**given, "lora_b": [torch.zeros_like(b) for b in given["lora_b"]]})
    ys, _ = lora_group.forward(group_of(given), given["x"].detach(), given["bias"])
    for y, wanted, base in zip(ys, exact, alone, strict=True):
        added = (wanted - base).detach()
        assert added.abs().median() < 0.2 * 2**-5  # y is about 7: its last place stands for 2^-5
        assert 0.7 < (((y.detach().double() - base) * added).sum() / added.square().sum()).item() < 1.3


@pytest.mark.parametrize("kernel", ["fp32_gemm", "library_gemm"])
def test_autocast_around_an_op_changes_nothing(kernel: str) -> None:
    """What products run in is the op's argument: halves of them in another dtype would not even fit together."""
    results = []
    for enabled in (False, True):
        given = lists_of(Case(x_dtype=torch.bfloat16, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            ys = torch.ops.qlora.lora_linear(**given, forward_kernel=kernel, backward_kernel=kernel)[:-1]
            sum(y.float().square().sum() for y in ys).backward()
        results.append([*ys, given["x"].grad, *(p.grad for p in given["lora_a"] + given["lora_b"])])
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype and torch.equal(plain, cast)


@pytest.mark.parametrize(("quant_type", "dropout"), [("none", 0.0), ("nf4", 0.0), ("nf4", 0.25)])
def test_gradients_by_gradcheck(quant_type: str, dropout: float) -> None:
    """On fp64 tensors: its backward is the derivative of its forward, in x, each A, each B and the biases."""
    fp64: dict[str, Any] = {"x_dtype": torch.float64, "dtype": torch.float64, "grad_bias": True}
    given = lists_of(case := Case(quant_type=quant_type, dropout=dropout, ranks=((3, 2), (), (4,)), **fp64))
    names = ("bias", "lora_a", "lora_b")
    for name in names:
        given[name] = [t.detach().double().requires_grad_() for t in given[name]]
    sizes = [len(given[name]) for name in names]

    def call(x: Tensor, *leaves: Tensor) -> list[Tensor]:
        parts = iter(leaves)
        lists = {name: [next(parts) for _ in range(n)] for name, n in zip(names, sizes)}
        return torch.ops.qlora.lora_linear(**given | {"x": x} | lists)[: len(case.out_features)]

    leaves = [given["x"], *(t for name in names for t in given[name])]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
