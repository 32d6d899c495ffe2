"""Whether a model reads the data, and is one to train on predicting the next token; found out before a run begins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..eager_kernels import eager_kernels
from ..errors import ConfigError
from ..positions import most_positions
from .data import PackedData

_TOKENS = 8  # of a probe: its cost is to read the weights
# Of the largest logit. A token changes those before it by 0 in causal models, by 1e-3 and more in others, though their
# weights may be random and small.
_CHANGED = 1e-4


def check_model_reads(model: Any, seq_len: int, *data: PackedData | None) -> None:
    """Raises DataError for a token without an embedding, and ConfigError where `seq_len` is beyond the model's positions,
    where a token is predicted from those behind it, and where labels are not those of the next token."""
    limit = most_positions(model)
    if limit is not None and seq_len > limit:
        raise ConfigError(
            f"seq_len is {seq_len}, but the model reads at most {limit} tokens: give --seq-len {limit} or less "
            f"(seq_len={limit})."
        )
    embeddings = model.get_input_embeddings().num_embeddings
    for part in data:
        if part is not None:
            part.check_vocabulary(embeddings)
    _check_next_token(model, torch.arange(1, min(_TOKENS, seq_len) + 1) % embeddings, embeddings)


def _check_next_token(model: Any, tokens: torch.Tensor, embeddings: int) -> None:
    device, kind = next(model.parameters()).device, type(model).__name__
    tokens = tokens[None].to(device)
    others = tokens.clone()
    others[0, -1] = (others[0, -1] + 1) % embeddings
    with torch.no_grad(), eager_kernels(device):
        out, logits = model(input_ids=tokens, labels=tokens), model(input_ids=others).logits[0]
    change = (out.logits[0] - logits).abs().amax(dim=-1)[:-1]
    if bool((change > _CHANGED * logits.abs().max()).all()):  # all: an expert's rows may be summed in another order
        raise ConfigError(
            f"{kind} sees the tokens that it is to predict, so it cannot be trained to write: take a causal model (one of "
            f'BERT\'s family is one with "is_decoder": true in its config.json).'
        )
    loss, shifted, plain = (float(x) for x in (out.loss, _loss(out.logits, tokens, 1), _loss(out.logits, tokens, 0)))
    if abs(loss - plain) < abs(loss - shifted):  # experts may add a loss of their own
        raise ConfigError(
            f"The labels of {kind} are those of the same token, not of the next one, so training would teach it to copy: "
            f"take a model whose loss shifts the labels, as those of Llama, Qwen and GPT-2 do."
        )


def _loss(logits: torch.Tensor, tokens: torch.Tensor, shift: int) -> torch.Tensor:
    """The mean cross entropy of tokens that are `shift` behind their logits."""
    return F.cross_entropy(logits[0, : tokens.shape[1] - shift].float(), tokens[0, shift:])
