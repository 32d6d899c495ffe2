"""Perplexity: every loss token with the same weight, and the model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlora_compile.errors import NonFiniteError
from qlora_compile.runtime.data import PackedData, pack
from qlora_compile.runtime.evaluate import evaluate
from qlora_compile.runtime.templates import Tokens


@pytest.fixture
def data() -> PackedData:
    """5 blocks of 13 tokens; the learned share differs from block to block."""
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 211, (61,), generator=draw).tolist()
    learn = [bool((i // 13 + 1) % 5 > i % 6) for i in range(61)]
    return pack([Tokens(ids, learn)], 13, pad=2)


def by_hand(model: nn.Module, data: PackedData) -> tuple[float, int]:
    """Summed negative log-likelihood and its number of tokens, one block at a time."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, labels in zip(data.input_ids.long(), data.labels.long()):
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits.float(), labels[1:], reduction="sum"))
            tokens += int((labels[1:] >= 0).sum())
    return total, tokens


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
def test_every_token_counts_once_whatever_the_batch(
    tiny_llama: Callable[..., nn.Module], data: PackedData, batch: int
) -> None:
    model = tiny_llama().eval()
    total, tokens = by_hand(model, data)
    found = evaluate(model, data, batch)
    assert found.tokens == tokens == data.loss_tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)  # fp32 sums in another order
    assert found.perplexity == math.exp(found.loss)


def test_the_limit_counts_micro_batches(tiny_llama: Callable[..., nn.Module], data: PackedData) -> None:
    first_three = PackedData(data.input_ids[:3], data.labels[:3], 1)
    model = tiny_llama()
    assert evaluate(model, data, 1, limit=3).loss == evaluate(model, first_three, 1).loss
    assert evaluate(model, data, 3, limit=99).tokens == data.loss_tokens


def test_dropout_is_off_and_training_mode_comes_back(tiny_llama: Callable[..., nn.Module], data: PackedData) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    assert evaluate(model, data, 2).loss == evaluate(model, data, 2).loss
    assert model.training and torch.is_grad_enabled()
    model.eval()
    evaluate(model, data, 2)
    assert not model.training


def test_a_loss_that_is_not_finite_is_an_error(tiny_llama: Callable[..., nn.Module], data: PackedData) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="evaluation data is nan"):
        evaluate(model, data, 2)
