"""Held-out text -> perplexity: exp of the mean negative log-likelihood, each loss token with the same weight."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import nn

from ..errors import NonFiniteError
from .data import PackedData


class Evaluation(NamedTuple):
    """`loss` is the mean negative log-likelihood in nats over `tokens` tokens."""

    loss: float
    perplexity: float
    tokens: int
    seconds: float


def evaluate(model: nn.Module, data: PackedData, batch: int, limit: int | None = None) -> Evaluation:
    """Perplexity of `model` on up to `limit` micro-batches of `data`, in evaluation mode and without gradients.

    Runs the model eagerly also where it is compiled: the numbers are the same, and evaluation is too short to pay for
    a second graph. Raises NonFiniteError where the loss is NaN or infinite.
    """
    device = next(model.parameters()).device
    started, was_training = time.perf_counter(), model.training
    total, tokens = 0.0, 0
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for blocks in data.in_order(batch, limit):
                part = data.batch(blocks)
                loss = model(input_ids=part.input_ids.to(device), labels=part.labels.to(device)).loss
                total += float(loss) * part.loss_tokens
                tokens += part.loss_tokens
    finally:
        model.train(was_training)
    mean = total / tokens
    if not math.isfinite(mean):
        raise NonFiniteError(f"The loss on the evaluation data is {mean}: the model does not work in this dtype.")
    # exp overflows a float above 709, a loss that no language model has.
    return Evaluation(mean, math.exp(min(mean, 700.0)), tokens, round(time.perf_counter() - started, 3))
