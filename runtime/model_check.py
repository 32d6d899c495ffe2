"""Whether a model reads the data, and is one to train on predicting the next token; found out before a run begins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..eager_kernels import eager_kernels
from ..errors import ConfigError
from ..positions import most_positions
from .data import IGNORE, PackedData

# Of a probe, which costs little more than to read the weights. (Too few for BigBird's sparse attention, which it then leaves
# for good.)
_TOKENS = 8
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
    """One call of two sequences, apart in their last token; the first one alone has a label, which a loss that shifts the
    labels leaves out, whatever else it adds."""
    device, kind = next(model.parameters()).device, type(model).__name__
    rows = tokens.to(device).repeat(2, 1)
    rows[1, -1] = (rows[1, -1] + 1) % embeddings
    labels = torch.full_like(rows, IGNORE)
    labels[:, 0] = rows[:, 0]
    with torch.no_grad(), eager_kernels(device):
        out = model(input_ids=rows, labels=labels)
    logits = out.logits.float()
    change = (logits[0] - logits[1]).abs().amax(dim=-1)[:-1]
    if bool((change > _CHANGED * logits.abs().max()).all()):
        raise ConfigError(
            f"{kind} sees the tokens that it is to predict, so it cannot be trained to write: take a causal model (one of "
            f'BERT\'s family is one with "is_decoder": true in its config.json).'
        )
    if float(out.loss) > float(F.cross_entropy(logits[:, 0], labels[:, 0])) / 2:  # else it is NaN: there is no label
        raise ConfigError(
            f"The labels of {kind} are those of the same token, not of the next one, so training would teach it to copy: "
            f"take a model whose loss shifts the labels, as those of Llama, Qwen and GPT-2 do."
        )
