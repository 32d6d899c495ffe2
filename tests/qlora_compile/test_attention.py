"""`attend` against torch's own attention, with each kind of mask and with weights asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.attention import attend, is_attention_weight

T, S, B, H, E = 5, 7, 3, 2, 14


def _masks(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(T, S, generator=generator) > 0.6
    hidden[:, 0] = False  # a row that sees nothing is NaN
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 5:] = padding[2, 3:] = True
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(T, S, generator=generator)},
        "by head": {"attn_mask": torch.randn(B * H, T, S, generator=generator)},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "causal": {"is_causal": True, "attn_mask": nn.Transformer.generate_square_subsequent_mask(T)},
    }
    return masks[kind]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "by head", "padding", "both", "causal"])
def test_it_is_what_torch_computes_between_identical_projections(kind: str, average: bool, need_weights: bool) -> None:
    keys = T if kind == "causal" else S
    q, k, v = torch.randn(T, B, E), torch.randn(keys, B, E), torch.randn(keys, B, E)
    given = _masks(kind)
    one = torch.eye(E)
    names = {f"{name}_proj_weight": one for name in "qkv"}
    expected = F.multi_head_attention_forward(
        q, k, v, E, H, None, None, None, None, False, 0.0, one, None, True,
        need_weights=need_weights, average_attn_weights=average, use_separate_proj_weight=True, **names, **given,
    )  # fmt: skip
    options: dict[str, Any] = {"key_padding_mask": None, "attn_mask": None, "is_causal": False} | given
    ours = attend(q, k, v, H, 0.0, **options, need_weights=need_weights, average=average)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)  # fp32, sums of up to 14 terms
    assert (ours[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-6)


def test_dropout_of_the_weights() -> None:
    x = torch.randn(T, B, E)
    for need_weights in (True, False):
        torch.manual_seed(1)
        one = attend(x, x, x, H, 0.5, None, None, False, need_weights, True)[0]
        other = attend(x, x, x, H, 0.0, None, None, False, need_weights, True)[0]
        assert not torch.allclose(one, other)


def test_which_parameters_are_weights_of_linears() -> None:
    def found(module: nn.Module) -> list[str]:
        names = [(name, *name.rpartition(".")[::2]) for name, _ in module.named_parameters()]
        return [name for name, path, key in names if is_attention_weight(module.get_submodule(path), key)]

    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, *_: Any, **__: Any) -> Any:
            return query @ self.in_proj_weight, None

    assert found(nn.MultiheadAttention(E, H)) == ["in_proj_weight", "out_proj.weight"]
    assert found(nn.MultiheadAttention(E, H, kdim=3)) == [
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"
    ]  # fmt: skip
    assert found(Own(E, H)) == ["out_proj.weight"]
    assert found(nn.Linear(3, 2)) == []
