"""What holds for every kernel of an op: it leaves its inputs as they were, and drops the same elements as the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_compile.lora_group import ROWS, LoRAGroup
from qlora_compile.runtime.kernels import dispatch
from qlora_compile.tensor import quantize_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
M, K, NS, RANKS = 9, 64, (40, 24), (3, 2)


def able(op: str, **sizes: Any) -> dict[str, Callable[..., Any]]:
    """The kernels that this machine runs for a problem, by name."""
    problem = dispatch.Problem(op, **sizes)
    found = {c.name: c.run for c in dispatch.candidates(op, "cpu") if c.declines(problem) is None}
    assert "library" in found or "library_gemm" in found
    return found  # type: ignore[return-value]


def linears(op: str, m: int, group: LoRAGroup) -> dict[str, Callable[..., Any]]:
    sizes: dict[str, Any] = {
        "m": dispatch.bucket(m),
        "n": tuple(group.out_features),
        "k": K,
        "rank": sum(group.ranks()),
    }
    kind = {"quant_type": group.quant_type, "block_size": 64, "dropout": bool(group.dropout)}
    return able(op, dtype=group.dtype, **sizes, **kind)


def group_of(dtype: torch.dtype, dropout: float, quant_type: str) -> LoRAGroup:
    dense = [torch.randn(n, K) for n in NS]
    parts: list[list[Tensor]] = [[], [], [], []]
    for weight in dense:
        data = quantize_4bit(weight, quant_type=quant_type).data_4bit if quant_type != "none" else [weight.to(dtype)]
        for part, value in zip(parts, data):
            part += [] if value is None else [value]
    a, b = [torch.randn(r, K) for r in RANKS], [torch.randn(n, r) for n, r in zip(NS, RANKS)]
    seeds = [torch.tensor(5), torch.tensor(6)] if dropout else []
    scaling = [torch.tensor(0.5), torch.tensor(1.5)]
    return LoRAGroup(*parts, a, b, scaling, [2.0, 1.0], [1, 1], seeds, dropout, NS, quant_type, 64, dtype)


def changed(call: Callable[[], Any], tensors: Iterable[Tensor]) -> list[int]:
    """Which of the tensors the call wrote into."""
    tensors = list(tensors)
    before = [t.detach().clone() for t in tensors]
    call()
    return [i for i, (old, new) in enumerate(zip(before, tensors, strict=True)) if not torch.equal(old, new)]


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linears_leave_their_inputs_as_they_were(dtype: torch.dtype, dropout: float, quant_type: str) -> None:
    group = group_of(dtype, dropout, quant_type)
    x, h = torch.randn(M, K).to(dtype), torch.randn(M, sum(RANKS)).to(dtype)
    dys, bias = [torch.randn(M, n).to(dtype) for n in NS], [torch.randn(n) for n in NS]
    own = [*group.weight, *group.absmax, *group.absmax_scale, *group.absmax_offset, *group.lora_a, *group.lora_b]
    own += [*group.scaling, *group.seed]
    for name, run in linears("lora_linear", M, group).items():
        assert not changed(lambda run=run: run(group, x, bias), [x, *bias, *own]), name
    for name, run in linears("lora_linear_backward", M, group).items():
        assert not changed(lambda run=run: run(group, dys, x, h, True, True), [*dys, x, h, *own]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_linears_and_attention_leave_their_inputs_as_they_were(dtype: torch.dtype) -> None:
    x, w, bias = (torch.randn(*shape).to(dtype) for shape in ((M, K), (NS[0], K), (NS[0],)))
    for name, run in able("dense_linear", m=dispatch.bucket(M), n=NS[:1], k=K, rank=0, dtype=dtype).items():
        assert not changed(lambda run=run: run(x, w, bias), [x, w, bias]), name
    q, k, v = (torch.randn(2, 3, length, 16).to(dtype).requires_grad_() for length in (20, 33, 33))
    added, dout = torch.randn(20, 33).to(dtype), torch.randn(2, 3, 20, 16).to(dtype)
    for name, run in able("attention", m=32, n=(33,), k=16, rank=0, dtype=dtype).items():
        for mask in (added, added > 0):

            def call(run: Callable[..., Tensor] = run, mask: Tensor = mask) -> None:
                torch.autograd.grad(run(q, k, v, mask, False, 0.25), (q, k, v), dout)

            assert not changed(call, [q, k, v, mask, dout]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_drops_the_same_elements(dtype: torch.dtype) -> None:
    """Forward and backward, with more rows than are drawn at once. W is zero, A and B are 1 on their diagonals and x and
    dy are 1, so that h and dx are the mask itself."""
    m = 2 * ROWS + 5
    ones, random, zero = torch.ones(m, K).to(dtype), torch.randn(m, K).to(dtype), torch.zeros(K, K).to(dtype)
    a, b, seed = torch.eye(K), torch.eye(K), torch.tensor(5)
    group = LoRAGroup([zero], [], [], [], [a], [b], [], [1.0], [1], [seed], 0.5, [K], "none", 64, dtype)
    mask = group.mask(0, ones)
    assert not torch.equal(mask[:ROWS], mask[ROWS : 2 * ROWS])
    for name, run in linears("lora_linear", m, group).items():
        assert torch.equal(run(group, ones, [])[1], mask), name
    exact = random.double().t() @ mask.double()
    for name, run in linears("lora_linear_backward", m, group).items():
        assert torch.equal(run(group, [ones], ones, ones, True, False)[0], mask), name
        (da,) = run(group, [random], ones, ones, False, True)[1]
        # sums of some thousand terms: 2^-8 where a product gives bf16
        assert (da.double() - exact).abs().max() <= exact.abs().max() * 2**-8, name
