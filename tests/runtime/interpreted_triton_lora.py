"""The GPU's candidates for `lora_linear` and its backward, under Triton's interpreter (see test_triton_interpreted.py).

Expected values are fp64 with the masks that `dropout_mask` draws; fp32 sums in another order are all that may differ.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_compile import lora_group, nf4
from qlora_compile.lora_group import LoRAGroup
from qlora_compile.runtime import kernels
from qlora_compile.runtime.kernels import (
    dispatch,
    gpu,
    triton_codec,
    triton_cross_entropy,
    triton_launch,
    triton_lora,
    triton_low_rank,
    triton_paged_step,
    tuning,
)
from qlora_compile.runtime.kernels.dispatch import Problem
from qlora_compile.runtime.kernels.paged_step_proof import proves_paged_step

GENERATOR = torch.Generator().manual_seed(29)
M, K = 19, 96
OUT = (21, 10, 7)
EXAMPLES = 15  # half a second to two each
FORWARD = {
    "gemm": triton_lora.forward_gemm,
    "low_rank": triton_lora.forward_low_rank,
    "joined": triton_lora.forward_joined,
}
BACKWARD = {
    "dx": triton_lora.backward_dx,
    "low_rank": triton_lora.backward_low_rank,
    "summed": triton_lora.backward_summed,
}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def _group(dropout: float, *, quant_type: str = "nf4", double_quant: bool = True) -> LoRAGroup:
    """Three linears with two, none and one adapter."""
    data = [nf4.quantize_reference(_randn(n, K), quant_type, 32, double_quant) for n in OUT]
    ranks, owners = (5, 3, 4), (0, 0, 2)
    scale = [d.absmax_scale for d in data] if double_quant else []
    offset = [d.absmax_offset for d in data] if double_quant else []
    return LoRAGroup(
        [d.codes for d in data], [d.absmax for d in data], scale, offset,
        [_randn(r, K) for r in ranks], [_randn(OUT[i], r) for r, i in zip(ranks, owners)],
        [torch.tensor(s) for s in (0.5, -1.25, 2.0)], [1.5, 2.0, 0.75], [2, 0, 1],
        [torch.tensor(11 + j) for j in range(3)] if dropout else [], dropout, list(OUT), quant_type, 32, torch.float32,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def the_gpus_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors too, masks that torch needs and dense weights come from the kernels, as on a GPU."""
    original: Callable[..., Any] = lora_group.kernel_for
    mine: dict[str, Callable[..., Any]] = {
        "dropout_mask": triton_low_rank.dropout_mask,
        "dequantize_4bit": triton_codec.dequantize_4bit,
    }
    monkeypatch.setattr(lora_group, "kernel_for", lambda op, d: mine.get(op) or original(op, d))


def _expected(group: LoRAGroup, x: Tensor, bias: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(y_i, [A_j ..., B_j ...], x) in fp64 with gradients."""
    x = x.double().requires_grad_()
    factors = [t.double().requires_grad_() for t in (*group.lora_a, *group.lora_b)]
    count = len(group.lora_a)
    ys = []
    for i, mine in enumerate(group.adapters_of()):
        y = x @ group.dense_weight(i, x.shape[1]).double().t()
        for j in mine:
            dropped = x * group.mask(j, x.float()).double() if group.dropout else x
            y = y + group.alpha[j] * group.scaling[j].double() * dropped @ factors[j].t() @ factors[count + j].t()
        ys.append(y + bias[i].double() if bias else y)
    return ys, factors, x


def _close(got: Tensor, expected: Tensor) -> None:
    """Sums of about 100 fp32 products, through two products: values up to 1e3."""
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("m", [M, 0])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, m: int, dropout: float, with_bias: bool) -> None:
    group, x = _group(dropout, double_quant=with_bias), _randn(m, K + 5)[:, :K]
    bias = [_randn(n) for n in OUT] if with_bias else []
    ys, h = FORWARD[name](group, x, bias)
    expected = _expected(group, x, bias)[0]
    for y, e in zip(ys, expected, strict=True):
        _close(y, e)
    parts = [x * group.mask(j, x) if dropout else x for j in range(3)]
    _close(h, torch.cat([p.double() @ a.double().t() for p, a in zip(parts, group.lora_a)], dim=1))


@pytest.mark.parametrize("m", [0, 1, 2])
def test_a_few_rows(m: int) -> None:
    group = _group(0.0, quant_type="fp4")
    wide = _randn(m, K + 3)[:, 3:]
    # the second time with the launch that was prepared, on adapters that have changed; the third with rows apart
    triton_launch._launches.clear()
    for x, launches in ((_randn(m, K), 1), (_randn(m, K), 1), (wide, 2)):
        ys, h = triton_lora.forward_vector(group, x, [])
        for y, e in zip(ys, _expected(group, x, [])[0], strict=True):
            _close(y, e)
        _close(h, torch.cat([x.double() @ a.double().t() for a in group.lora_a], dim=1))
        assert sum(what[0] == "lora_linear_vector" for what, *_ in triton_launch._launches) == launches
        for t in (*group.lora_a, *group.lora_b, *group.scaling):
            t.mul_(-1.5)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("m", [M, 0])
@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str, m: int, dropout: float) -> None:
    group, x = _group(dropout), _randn(m, K)
    dys = [_randn(m, n) for n in OUT]
    h = triton_lora.low_rank(group, x)
    ys, factors, wide = _expected(group, x, [])
    torch.autograd.backward(ys, [dy.double() for dy in dys])
    dx, da, db = BACKWARD[name](group, dys, x, h, True, True)
    assert dx is not None and wide.grad is not None
    _close(dx, wide.grad)
    for got, factor in zip((*da, *db), factors, strict=True):
        assert factor.grad is not None
        _close(got, factor.grad)
    assert BACKWARD[name](group, dys, x, h, False, False) == (None, [], [])


@st.composite
def _any_group(
    draw: st.DrawFn, rows: tuple[int, ...], columns: tuple[int, ...]
) -> tuple[LoRAGroup, Tensor, list[Tensor]]:
    """A group of one to three linears with up to four adapters among them, an x whose rows lie apart, and biases."""
    GENERATOR.manual_seed(31)  # the same values whatever ran before
    quant_type, block = draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from([32, 64, 128]))
    m, k = draw(st.sampled_from(rows)), draw(st.sampled_from(columns))
    outs = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    owners = sorted(draw(st.lists(st.integers(0, len(outs) - 1), max_size=4)))
    ranks = [draw(st.integers(1, 20)) for _ in owners]
    dropout, double = draw(st.sampled_from([0.0, 0.3])), draw(st.booleans())
    data = [nf4.quantize_reference(_randn(n, k), quant_type, block, double) for n in outs]
    group = LoRAGroup(
        [d.codes for d in data], [d.absmax for d in data],
        [d.absmax_scale for d in data] if double else [], [d.absmax_offset for d in data] if double else [],
        [_randn(r, k) for r in ranks], [_randn(outs[i], r) for r, i in zip(ranks, owners)],
        [torch.tensor(0.5 + j) for j in range(len(ranks))], [1.5] * len(ranks), [owners.count(i) for i in range(len(outs))],
        [torch.tensor(3 + j) for j in range(len(ranks))] if dropout else [], dropout, outs, quant_type, block,
        torch.float32,
    )  # fmt: skip
    return group, _randn(m, k + 5)[:, 2 : k + 2], [_randn(n) for n in outs] if draw(st.booleans()) else []


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Problem], list[dispatch.Candidate]]]:
    """The candidates of a GPU that take a problem."""
    kept = list(dispatch._candidates)
    triton_lora.register()

    def found(problem: Problem) -> list[dispatch.Candidate]:
        with mock.patch.object(kernels, "find", lambda op, device: print):
            return [c for c in dispatch.candidates(problem.op, "cuda") if c.run and c.declines(problem) is None]

    yield found
    dispatch._candidates[:] = kept
    dispatch.forget_choices()


# the seed is fixed: an example that fails does so in every run. None is shrunk, which takes minutes under the interpreter
@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
    phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
)  # fmt: skip
@pytest.mark.parametrize(("rows", "columns"), [((0, 1, 2, 3, 17), (32, 33, 40, 96, 160)), ((65, 80), (33, 128))])
@given(data=st.data())
def test_any_sizes(
    able: Callable[[Problem], list[dispatch.Candidate]],
    rows: tuple[int, ...],
    columns: tuple[int, ...],
    data: st.DataObject,
) -> None:
    """Every candidate that does not decline, forward and backward: some take few rows, some many and whole blocks."""
    group, x, bias = data.draw(_any_group(rows, columns))
    m, k, count = *x.shape, len(group.lora_a)
    form = group.quant_type, group.block_size, "cuda", bool(group.dropout)
    problem = Problem(
        "lora_linear", dispatch.bucket(m), tuple(group.out_features), k, sum(group.ranks()), torch.float32, *form
    )
    ys, factors, wide = _expected(group, x, bias)
    parts = [x * group.mask(j, x) if group.dropout else x for j in range(count)]
    low = [part.double() @ a.double().t() for part, a in zip(parts, group.lora_a)]
    h = torch.cat(low, dim=1) if low else x.new_empty((m, 0))
    for candidate in able(problem):
        event(f"lora_linear {candidate.name}")  # how many of each: --hypothesis-show-statistics
        got, saved = candidate.run(group, x, bias)  # type: ignore[misc]
        for y, e in zip([*got, saved], [*ys, h], strict=True):
            _near(candidate.name, y, e)
    dys = [_randn(m, n) for n in group.out_features]
    grads = torch.autograd.grad(
        ys, [wide, *factors], [dy.double() for dy in dys], allow_unused=True, materialize_grads=True
    )
    for candidate in able(problem._replace(op="lora_linear_backward")):
        event(f"lora_linear_backward {candidate.name}")
        dx, da, db = candidate.run(group, dys, x, h.float(), True, True)  # type: ignore[misc]
        for mine, grad in zip([dx, *da, *db], grads, strict=True):
            _near(candidate.name, mine, grad)


def _near(name: str, got: Tensor, expected: Tensor) -> None:
    """Sums of up to 160 fp32 products, through two products: of the largest value, or of 1."""
    assert got.shape == expected.shape, name
    if got.numel():
        error, largest = (got.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 3e-5 * max(largest, 1.0), f"{name}: off by {error} where the largest value is {largest}"


def test_more_ranks_than_one_launch_holds() -> None:
    """3 x 100 ranks are padded to 3 x 128: two launches."""
    group, x = _group(0.0), _randn(5, K)
    group.lora_a = [_randn(100, K) / 10 for _ in range(3)]
    group.lora_b = [_randn(n, 100) / 10 for n in (21, 21, 7)]
    ys, _, wide = _expected(group, x, [])
    for y, e in zip(triton_lora.forward_low_rank(group, x, [])[0], ys, strict=True):
        _close(y, e)
    dys, h = [_randn(5, n) for n in OUT], triton_lora.low_rank(group, x)
    torch.autograd.backward(ys, [dy.double() for dy in dys])
    for name in ("low_rank", "summed"):
        dx = BACKWARD[name](group, dys, x, h, True, False)[0]
        assert dx is not None and wide.grad is not None
        _close(dx, wide.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_proofs_know_no_default_dtype_or_device(dtype: torch.dtype) -> None:
    before, cpu = torch.get_default_dtype(), torch.device("cpu")
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            gpu.proves_dequantize(triton_codec.dequantize_4bit, cpu)  # no: the interpreter truncates to bf16
            assert gpu.proves_quantize(triton_codec.quantize_4bit, cpu)
            assert gpu.proves_dropout_mask(triton_low_rank.dropout_mask, cpu)
            assert gpu.proves_cross_entropy(triton_cross_entropy.cross_entropy, cpu)
            assert proves_paged_step(triton_paged_step.paged_step, cpu)
    finally:
        torch.set_default_dtype(before)


FAILURES: dict[Exception, str] = {
    RuntimeError("Triton Error [CUDA]: bad\nmore"): "RuntimeError: Triton Error [CUDA]: bad",
    # Triton compiles a launcher by a C compiler: no Python.h, no library that loads, a cache that cannot be written
    subprocess.CalledProcessError(1, ["gcc"]): "CalledProcessError: Command '['gcc']' returned non-zero exit status 1.",
    ImportError("launcher.so: undefined symbol"): "ImportError: launcher.so: undefined symbol",
    PermissionError(13, "Permission denied"): "PermissionError: [Errno 13] Permission denied",
}


def test_a_proof_that_fails_is_told_and_one_without_memory_is_none() -> None:
    cpu = torch.device("cpu")

    def proof(kernel: Any, device: torch.device) -> bool:
        return bool(kernel())

    assert gpu._why_not(proof, lambda: True, cpu) == ""
    assert gpu._why_not(proof, lambda: False, cpu) == "does not give the reference's numbers"
    for error, told in FAILURES.items():
        assert gpu._why_not(proof, mock.Mock(side_effect=error), cpu) == f"fails ({told})"
    with pytest.raises(torch.OutOfMemoryError):
        gpu._why_not(proof, mock.Mock(side_effect=torch.OutOfMemoryError()), cpu)


def test_kernels_prove_themselves() -> None:
    cpu = torch.device("cpu")
    assert gpu.proves_quantize(triton_codec.quantize_4bit, cpu)

    def wrong(*args: Any) -> None:
        triton_codec.dequantize_4bit(*args)
        args[-1].view(-1)[-1] += 1

    assert not gpu.proves_dequantize(wrong, cpu)
    assert gpu.proves_cross_entropy(triton_cross_entropy.cross_entropy, cpu)

    def next_class(z: Tensor, target: Tensor, *rest: Any) -> None:
        triton_cross_entropy.cross_entropy(z, (target + 1) % z.shape[1], *rest)

    def loses_gradients_in_place(z: Tensor, target: Tensor, losses: Tensor, out: Tensor, *rest: Any) -> None:
        triton_cross_entropy.cross_entropy(z, target, losses, None if out is z else out, *rest)

    assert not gpu.proves_cross_entropy(next_class, cpu)
    assert not gpu.proves_cross_entropy(loses_gradients_in_place, cpu)
    assert gpu.proves_dropout_mask(triton_low_rank.dropout_mask, cpu)
    for change in (lambda mask: mask * 2, lambda mask: mask[torch.randperm(len(mask))], torch.ones_like):
        assert not gpu.proves_dropout_mask(lambda *args, c=change: c(triton_low_rank.dropout_mask(*args)), cpu)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "measured", lambda device: ())
    problem = Problem("lora_linear", 2, (64,), 96, 8, torch.bfloat16, "nf4", 64, "cuda")
    kept = list(dispatch._candidates)
    try:
        triton_lora.register()
        monkeypatch.setattr(kernels, "find", lambda op, device: print)
        names = {c.name: c.declines(problem) for c in dispatch.candidates("lora_linear", "cuda")}
        ragged = {"joined_gemm": "K is no multiple of the block of 64"}
        fits = {"library_gemm": None, "triton_vector": None, "triton_gemm": None, "triton_low_rank": None}
        assert names == fits | ragged
        choice = dispatch.choose(problem)
        assert choice.name == "library_gemm"  # nothing was measured
        for changed, name, reason in (
            ({"m": 8}, "triton_vector", "at most 2 rows"),
            ({"dropout": True}, "triton_vector", "draws no masks"),
            ({"k": 72}, "triton_gemm", "multiple of 32"),
            ({"quant_type": "none"}, "triton_gemm", "dense"),
            ({"rank": 0}, "triton_low_rank", "no adapter"),
            ({"rank": 300}, "triton_gemm", "at most 256 ranks"),
        ):
            other = dispatch.choose(problem._replace(**changed), name)
            assert other.name == "library_gemm" and reason in other.why
        back = problem._replace(op="lora_linear_backward", m=128)
        single, several = (
            dispatch.choose(back, "summed_gemm"),
            dispatch.choose(back._replace(n=(64, 32)), "summed_gemm"),
        )
        assert "for several linears" in single.why and several.name == "summed_gemm"
        dispatch.forget_choices()
        monkeypatch.setattr(kernels, "find", lambda op, device: print if op == "dequantize_4bit" else None)
        assert dispatch.choose(problem, "triton_gemm").name == "triton_gemm"
        assert "dropout_mask does not" in dispatch.choose(problem._replace(dropout=True), "triton_gemm").why
        dispatch.forget_choices()
        monkeypatch.setattr(kernels, "find", lambda op, device: None)
        for op in ("lora_linear", "lora_linear_backward"):
            only = dispatch.choose(problem._replace(op=op, k=128, m=128))
            assert only.name == "library_gemm" and only.why.startswith("the only one that takes it")
    finally:
        dispatch._candidates[:] = kept
        dispatch.forget_choices()
