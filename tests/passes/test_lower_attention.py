"""lower_attention: what it rewrites, how it reads shared key heads, what it leaves alone and why, and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.passes import lower_attention
from qlora_compile.runtime import kernels

sdpa = F.scaled_dot_product_attention


class Attend(nn.Module):
    """q [2, 6, 20, 8] and k, v [2, 3, 20, 8] out of one projection."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.proj, self.attend = nn.Linear(24, 96, bias=False), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.proj(x).view(2, 20, 12, 8).transpose(1, 2).split((6, 3, 3), dim=1)
        return self.attend(q, k, v)


def trace(
    traced: Callable[..., Any], attend: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Any:
    torch.manual_seed(0)
    t = traced(Attend(attend).to(dtype), torch.randn(2, 20, 24, dtype=dtype), **options)
    t.ctx.chooser = kernels.choose_kernel
    return t


def by_transformers(t: Tensor) -> Tensor:
    return t[:, :, None, :, :].expand(2, 3, 2, 20, 8).reshape(2, 6, 20, 8)


def by_unsqueeze(t: Tensor) -> Tensor:
    return t.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(2, 6, 20, 8)


def by_interleave(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, dim=1)


REPEATS = [by_transformers, by_unsqueeze, by_interleave]


@pytest.mark.parametrize("kernel", ["fp32", "flash", "flash_fp32"])
@pytest.mark.parametrize("repeat", REPEATS)
def test_repeated_heads_are_read_as_they_were(
    traced: Callable[..., Any], repeat: Callable[[Tensor], Tensor], kernel: str
) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True), kernels={"attention": kernel})
    (weight,) = (p for p in t.model.parameters())
    before = t.numbers(weight)
    assert t.count(lower_attention) == 1
    (node,) = t.nodes("attention")
    assert [tuple(arg.meta["example_value"].shape) for arg in node.args[:3]] == [(2, 6, 20, 8), *[(2, 3, 20, 8)] * 2]
    assert "expand" not in t.targets() and "repeat_interleave" not in t.targets()
    assert node.args[3:5] == (None, True)
    assert node.args[6] == kernel or kernels.find("attention_forward", "cpu") is None  # each declines for some machine
    for got, want in zip(t.numbers(weight), before):
        # two kernels that round probabilities and their gradients to bf16: some units of the largest value apart
        assert (got - want).abs().max() <= 2**-5 * want.abs().max()
    assert t.count(lower_attention) == 0


@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": torch.rand(2, 1, 20, 20) > 0.2, "scale": 0.4},
        {"attn_mask": torch.linspace(-2, 2, 400).view(20, 20).bfloat16()},
        {},
    ],
)
def test_enable_gqa_and_masks(traced: Callable[..., Any], given: dict[str, Any]) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, k, v, enable_gqa=True, **given), kernels={"attention": "fp32"})
    before = t()
    assert t.count(lower_attention) == 1
    torch.testing.assert_close(t(), before, atol=2**-6, rtol=2**-6)  # bf16: two units


@pytest.mark.parametrize(
    "mixed",
    [
        lambda t: t[:, :, None].expand(2, 3, 2, 20, 8).transpose(1, 2).reshape(2, 6, 20, 8),  # another order of heads
        lambda t: t[:, [2, 1, 0], None].expand(2, 3, 2, 20, 8).reshape(2, 6, 20, 8),
        lambda t: t.repeat(1, 2, 1, 1),
    ],
)
def test_other_orders_of_heads_are_taken_as_they_come(
    traced: Callable[..., Any], mixed: Callable[[Tensor], Tensor]
) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, mixed(k), mixed(v)), kernels={"attention": "fp32"})
    before = t()
    t.run(lower_attention)
    torch.testing.assert_close(t(), before, atol=2**-6, rtol=2**-6)


def test_a_repeated_key_beside_other_values_stays(traced: Callable[..., Any]) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, by_interleave(k), q), kernels={"attention": "fp32"})
    assert t.count(lower_attention) == 1
    (node,) = t.nodes("attention")
    assert node.args[1].meta["example_value"].shape[1] == 6


def test_the_library_s_stays_and_is_reported(traced: Callable[..., Any]) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, q, q), kernels={"attention": "library"})
    assert t.count(lower_attention) == 0
    (node,) = t.nodes("scaled_dot_product_attention")
    ((op, choice),) = node.meta["qlora_kernels"]
    assert (op, choice.name, choice.why) == ("attention", "library", "forced by option")


def test_fp64_goes_to_the_library(traced: Callable[..., Any]) -> None:
    assert trace(traced, lambda q, k, v: sdpa(q, q, q), torch.float64).count(lower_attention) == 0


def test_an_fp32_model_s_numbers_stay(traced: Callable[..., Any]) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, by_interleave(k), by_interleave(v), is_causal=True), torch.float32,
              kernels={"attention": "flash_fp32"})  # fmt: skip
    (weight,) = (p for p in t.model.parameters())
    before = t.numbers(weight)
    assert t.count(lower_attention) == 1
    for got, want in zip(t.numbers(weight), before):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)  # fp32 sums of some hundred terms in another order


def test_without_a_runtime_nothing_is_chosen(traced: Callable[..., Any]) -> None:
    t = trace(traced, lambda q, k, v: sdpa(q, q, q))
    t.ctx.chooser = None
    assert t.count(lower_attention) == 0


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: sdpa(q, q, q, dropout_p=0.5), "it drops out"),
        (lambda q, k, v: sdpa(q[0], q[0], q[0])[None].expand(2, -1, -1, -1), "four dimensions"),
        (lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]), "different numbers of heads"),
        (lambda q, k, v: sdpa(q, q, q[:, :1]), "different batches or heads"),
        (lambda q, k, v: sdpa(q, q, q, attn_mask=q @ q.mT), "its mask trains"),
    ],
)
def test_declined_with_a_reason(traced: Callable[..., Any], attend: Callable[..., Tensor], reason: str) -> None:
    t = trace(traced, attend)
    (text,) = t.declined(lower_attention).values()
    assert text.startswith("attention stays as it is: ") and reason in text
