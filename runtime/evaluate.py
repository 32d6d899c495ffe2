"""Held-out text -> perplexity: exp of the mean negative log-likelihood, each loss token with the same weight.

The likelihood is added up by document too, so that two runs can be compared document by document.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..eager_kernels import eager_kernels
from ..errors import NonFiniteError
from .data import IGNORE, PackedData


class Evaluation(NamedTuple):
    """`loss` is the mean negative log-likelihood in nats over `tokens` tokens.

    `documents` has (index, summed negative log-likelihood, tokens) of each document that has tokens to predict.
    """

    loss: float
    perplexity: float
    tokens: int
    seconds: float
    documents: tuple[tuple[int, float, int], ...]


def evaluate(model: nn.Module, data: PackedData, batch: int, limit: int | None = None) -> Evaluation:
    """Perplexity of `model` on up to `limit` micro-batches of `data`, in evaluation mode and without gradients.

    Runs the model eagerly also where it is compiled: the numbers are the same, and evaluation is too short to pay for
    a second graph. Dense products and attention run by the kernels that such a graph would have. Raises NonFiniteError
    where the loss is NaN or infinite.
    """
    device = next(model.parameters()).device
    started, was_training = time.perf_counter(), model.training
    losses = torch.zeros(max(data.documents, 1), dtype=torch.float64)
    counts = torch.zeros(len(losses), dtype=torch.int64)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), eager_kernels(device):
            for blocks in data.in_order(batch, limit):
                part = data.batch(blocks)
                logits = model(input_ids=part.input_ids.to(device)).logits
                counted = part.labels[:, 1:] != IGNORE
                document = data.document_of(blocks)[:, 1:][counted]
                losses.index_add_(0, document, _token_losses(logits, part.labels)[counted])
                counts += torch.bincount(document, minlength=len(counts))
    finally:
        model.train(was_training)
    tokens = int(counts.sum())
    mean = float(losses.sum()) / tokens
    if not math.isfinite(mean):
        raise NonFiniteError(f"The loss on the evaluation data is {mean}: the model does not work in this dtype.")
    seen = tuple((d, float(losses[d]), int(counts[d])) for d in counts.nonzero()[:, 0].tolist())
    # exp overflows a float above 709, a loss that no language model has.
    return Evaluation(mean, math.exp(min(mean, 700.0)), tokens, round(time.perf_counter() - started, 3), seen)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, S, V], labels [B, S] -> the negative log-likelihood of each label but the first, fp64 [B, S - 1].

    One sequence at a time: only its logits are widened to fp32.
    """
    rows = [
        F.cross_entropy(logits[b, :-1].float(), labels[b, 1:].to(logits.device), ignore_index=IGNORE, reduction="none")
        for b in range(len(labels))
    ]
    return torch.stack(rows).double().cpu()
