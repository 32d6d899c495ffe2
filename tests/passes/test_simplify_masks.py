"""simplify_masks: which computed masks become a flag, which do not, what lower_attention splits; the numbers of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_compile.passes import lower_attention, simplify_masks
from qlora_compile.runtime import kernels

masking_utils = pytest.importorskip("transformers.masking_utils")
from transformers import LlamaConfig  # noqa: E402

L = 20
CONFIG = LlamaConfig(attn_implementation="sdpa")
MakeMask = Callable[[Tensor], Tensor]


class Attend(nn.Module):
    """x [2, L, 24], keys that are seen [2, L] -> attention of q, k, v [2, 3, L, 8] under `make_mask(seen)`."""

    def __init__(self, make_mask: MakeMask) -> None:
        super().__init__()
        self.proj, self.make_mask = nn.Linear(24, 72, bias=False), make_mask

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = self.proj(x).view(x.shape[0], x.shape[1], 9, 8).transpose(1, 2).split((3, 3, 3), dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.make_mask(seen))


def trace(traced: Callable[..., Any], make_mask: MakeMask, **options: Any) -> Any:
    torch.manual_seed(0)
    seen = torch.ones(2, L, dtype=torch.bool)
    seen[0, :3] = seen[1, 15:] = False
    t = traced(Attend(make_mask).bfloat16(), torch.randn(2, L, 24, dtype=torch.bfloat16), seen, **options)
    t.ctx.chooser = kernels.choose_kernel
    return t


def keys(start: int = 0) -> Tensor:
    return torch.arange(L) + start


def rows(start: int = 0) -> Tensor:
    return torch.arange(start, L + start)[:, None]


def by_transformers(seen: Tensor, padded: bool = True) -> Tensor:
    """Its mask of positions and, where it gets no padding mask, of packed sequences."""
    batch, length = seen.shape
    positions, padding = torch.arange(length)[None], seen if padded else None
    mask = masking_utils.create_causal_mask(CONFIG, torch.empty(batch, length, 24), padding, None, positions)
    assert isinstance(mask, Tensor)
    return mask


CAUSAL: dict[str, MakeMask] = {
    "transformers": lambda seen: by_transformers(seen, padded=False),
    "key <= query": lambda seen: keys() <= rows(),
    "query >= key": lambda seen: (rows(4) >= keys(4))[None, None],
    "key < query + 1": lambda seen: (keys() < rows() + 1)[None, None, :, :],
    "query > key - 1": lambda seen: (rows() > keys() - 1).expand(2, 1, L, L),
    "a table of positions": lambda seen: torch.arange(5, 5 + L)[keys()] <= torch.arange(5, 5 + L)[rows()],
    "and what is always true": lambda seen: (keys() <= rows()) & torch.ones((), dtype=torch.bool) & (keys() <= rows()),
    "a comparison called as a method": lambda seen: (
        (keys() <= rows()) & torch.diff(keys(), prepend=keys()[:1] - 1).__eq__(1)
    ),
    "one packed sequence": lambda seen: (keys() <= rows()) & (torch.diff(keys(), prepend=keys()[:1] - 1) == 1),
}


def test_sizes_may_be_symbolic(traced: Callable[..., Any]) -> None:
    with torch._dynamo.config.patch(assume_static_by_default=False):
        t = trace(traced, CAUSAL["transformers"])
    (node,) = t.nodes("scaled_dot_product_attention")
    assert isinstance(node.kwargs["attn_mask"].meta["example_value"].shape[-1], torch.SymInt)
    assert t.count(simplify_masks) == 1 and node.kwargs == {"is_causal": True}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_becomes_the_flag(traced: Callable[..., Any], name: str) -> None:
    t = trace(traced, CAUSAL[name])
    before = t()
    assert t.count(simplify_masks) == 1
    (node,) = t.nodes("scaled_dot_product_attention")
    assert node.kwargs == {"is_causal": True} and len(node.args) == 3
    assert not t.nodes("le") and not t.nodes("ge") and not t.nodes("lt") and not t.nodes("gt")
    torch.testing.assert_close(t(), before, atol=2**-7, rtol=2**-7)
    assert t.count(simplify_masks) == 0


def test_a_mask_that_hides_nothing_is_dropped(traced: Callable[..., Any]) -> None:
    t = trace(traced, lambda seen: torch.ones(L, L, dtype=torch.bool))
    assert t.count(simplify_masks) == 1
    (node,) = t.nodes("scaled_dot_product_attention")
    assert node.kwargs == {"is_causal": False}


def written_over(seen: Tensor) -> Tensor:
    positions = keys()
    positions[3:].add_(1)
    return positions <= rows()


OTHERS: dict[str, MakeMask] = {
    "the next key too": lambda seen: keys() <= rows() + 1,
    "not itself": lambda seen: (keys() < rows()) | (keys() == 0),
    "the other way round": lambda seen: keys() >= rows(),
    "columns are queries": lambda seen: rows() <= keys(),
    "one row for all queries": lambda seen: keys() <= torch.arange(1)[:, None],
    "a window": lambda seen: (keys() <= rows()) & (keys() > rows() - 5),
    "negative positions are counted from the end": lambda seen: keys() <= torch.arange(L)[rows(-2)],
    "positions that are given": lambda seen: seen.long().cumsum(-1)[:1] <= rows(),
    "positions that are written over": written_over,
    "small numbers wrap": lambda seen: (
        torch.arange(250, 250 + L).to(torch.uint8) <= torch.arange(250, 250 + L)[:, None]
    ),
    "whole numbers as truth": lambda seen: (torch.arange(L)[None, :] * torch.ones(L, 1, dtype=torch.long)).bool(),
    "floating point": lambda seen: torch.zeros(L, L, dtype=torch.bfloat16),
    "two packed sequences": lambda seen: (keys() <= rows()) & ((keys() // 7) == (rows() // 7)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(traced: Callable[..., Any], name: str) -> None:
    t = trace(traced, OTHERS[name], kernels={"attention": "fp32"})
    before = t()
    assert t.count(simplify_masks) == 0
    (sdpa,) = t.nodes("scaled_dot_product_attention")
    mask = sdpa.kwargs["attn_mask"]
    assert t.count(lower_attention) == 1
    (node,) = t.nodes("attention")
    assert node.args[3:5] == (mask, False)
    torch.testing.assert_close(t(), before, atol=2**-6, rtol=2**-6)


PADDED: dict[str, MakeMask] = {
    "transformers": by_transformers,
    "padding last": lambda seen: (keys() <= rows()) & seen[:, None, None, :],
    "padding first, and more": lambda seen: seen[:, None, None] & (keys() <= rows())[None] & (keys()[None] != 4),
}


@pytest.mark.parametrize("kernel", ["fp32", "flash"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_stays_as_one_row_of_keys(traced: Callable[..., Any], name: str, kernel: str) -> None:
    t = trace(traced, PADDED[name], kernels={"attention": kernel})
    (weight,) = t.model.parameters()
    before = t.numbers(weight)
    assert t.run(simplify_masks, lower_attention)[-1].rewrites == 1
    (node,) = t.nodes("attention")
    assert node.args[4] is True and node.args[3].meta["example_value"].shape == (2, 1, 1, L)
    assert not t.nodes("le")
    for got, want in zip(t.numbers(weight), before):
        # the padded queries' results are zero in both; two kernels round probabilities to bf16 on their own
        assert (got - want).abs().max() <= 2**-5 * want.abs().max()


def test_the_library_s_attention_keeps_a_mask_that_says_more(traced: Callable[..., Any]) -> None:
    t = trace(traced, PADDED["transformers"], kernels={"attention": "library"})
    assert t.run(simplify_masks, lower_attention)[-1].rewrites == 0
    (node,) = t.nodes("scaled_dot_product_attention")
    assert "attn_mask" in node.kwargs
