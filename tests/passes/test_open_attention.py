"""open_attention: nn.MultiheadAttention's one call -> linears around `attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_compile.passes import PIPELINE, inline_checkpoints, open_attention

E = 22
OPEN = (inline_checkpoints, open_attention)


class Attention(nn.Module):
    """Attention of x on itself, on one other tensor, or on two."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        sizes = {"kdim": 10, "vdim": 13} if kind == "sizes" else {}
        self.attention = nn.MultiheadAttention(E, 2, **sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        key, value = {
            "self": lambda: (x, x),
            "cross": lambda: (x[2:] + 1,) * 2,
            "three": lambda: (x[2:] + 1, x[2:] - 1),
            "sizes": lambda: (x[2:, :, :10], x[2:, :, :13]),
        }[self.kind]()
        return self.attention(x, key, value, need_weights=False)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "products"), [("self", 2), ("cross", 3), ("three", 4), ("sizes", 4)])
def test_one_linear_for_each_product(traced: Callable[..., Any], kind: str, products: int, bias: bool) -> None:
    model, x = Attention(kind, bias=bias), torch.randn(6, 3, E, requires_grad=True)
    t = traced(model, x)
    before = t.numbers(x)
    assert t.count(*OPEN) == 1
    assert len(t.nodes("linear")) == products and not t.nodes("multi_head_attention_forward")
    for ours, theirs in zip(t.numbers(x), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # fp32, sums of 22 terms
    assert t.count(*OPEN) == 0


def test_every_projection_becomes_one_fused_op(traced: Callable[..., Any]) -> None:
    t = traced(Attention("self"), torch.randn(6, 3, E))
    t.run(*PIPELINE)
    assert [node.meta["qlora_sites"] for node in t.nodes("lora_linear")] == [
        ("attention.in_proj_weight",),
        ("attention.out_proj",),
    ]


@pytest.mark.parametrize(
    ("options", "x_shape", "reason"),
    [
        ({"add_bias_kv": True}, (6, 3, E), "its attention adds keys and values of its own"),
        ({"add_zero_attn": True}, (6, 3, E), "its attention adds keys and values of its own"),
        ({}, (6, E), "its attention has no batch"),
    ],
)
def test_what_stays(traced: Callable[..., Any], options: Any, x_shape: tuple[int, ...], reason: str) -> None:
    t = traced(Attention("self", **options), torch.randn(x_shape))
    assert t.declined(*OPEN) == {"attention.in_proj_weight": reason}


def test_attention_that_is_no_target_stays(traced: Callable[..., Any]) -> None:
    t = traced(Attention("self"), torch.randn(6, 3, E), target_modules=["other"])
    assert t.declined(*OPEN) == {}
