"""Files -> packed blocks of constant shape, and the order in which a run takes them.

Documents are laid end to end, each closed by the end-of-sequence token, and cut into blocks of `seq_len` tokens, so
that every micro-batch has one shape and nothing is compiled twice. As is usual for packing, attention is causal over
the whole block: a document sees the end of the one before it. The last block is padded with tokens that count in no
loss; blocks without any token to learn are left out.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import DataError
from .data_files import read_records
from .templates import Tokens, tokenize

IGNORE = -100  # the label that torch's and transformers' cross entropy leave out


class Batch(NamedTuple):
    """`input_ids` and `labels`, both int64 [B, S]; `loss_tokens` is how many labels count after the causal shift."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_tokens: int


@dataclass(frozen=True)
class PackedData:
    """`input_ids` and `labels` (-100: not learned) of all blocks, both int32 [N, S].

    In the text before it was cut, block n started at token `block_starts[n]` and document d ended before `ends[d]`, both
    int64; without them all is one document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    documents: int
    block_starts: torch.Tensor | None = None
    ends: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def loss_tokens(self) -> int:
        """How many labels count in the loss: the first of each block has nothing before it to be predicted from."""
        return count_loss_tokens(self.labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of every token and label, so that a resumed run can tell whether it sees the same data."""
        digest = hashlib.sha256(f"{tuple(self.input_ids.shape)}".encode())
        for tensor in (self.input_ids, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What `run.json` says of it: `sha256`, `blocks`, `documents`."""
        return {"sha256": self.fingerprint, "blocks": len(self), "documents": self.documents}

    def batch(self, blocks: Sequence[int] | torch.Tensor) -> Batch:
        """The blocks of these indices as one micro-batch."""
        index = torch.as_tensor(blocks)
        labels = self.labels[index].long()
        return Batch(self.input_ids[index].long(), labels, count_loss_tokens(labels))

    def in_order(self, batch: int, limit: int | None = None) -> list[torch.Tensor]:
        """Block indices of up to `limit` micro-batches in file order; the last one may be smaller."""
        return list(torch.arange(len(self)).split(batch))[:limit]

    def document_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Block indices [B] -> the document that each of their tokens belongs to, int64 [B, S]."""
        if self.block_starts is None or self.ends is None:
            return torch.zeros(len(blocks), self.input_ids.shape[1], dtype=torch.int64)
        position = self.block_starts[blocks, None] + torch.arange(self.input_ids.shape[1])
        # The padding of the last block lies behind all documents; it counts in no loss.
        return torch.searchsorted(self.ends, position, right=True).clamp_(max=len(self.ends) - 1)

    def check_vocabulary(self, embeddings: int) -> None:
        """Raises DataError where a token has no embedding in a model that has so many."""
        largest = int(self.input_ids.max())
        if largest >= embeddings:
            raise DataError(
                f"The data holds token {largest}, but the model has {embeddings} token embeddings: the tokenizer in "
                f"its folder does not belong to it."
            )


def count_loss_tokens(labels: torch.Tensor) -> int:
    """Labels [..., S] -> how many of them count after the causal shift."""
    return int((labels[..., 1:] != IGNORE).sum())


def load_data(path: Path, tokenizer: Any, seq_len: int) -> PackedData:
    """A file or folder -> PackedData. Raises DataError naming file and line for whatever cannot be used."""
    documents = (document for record in read_records(path) for document in tokenize(record, tokenizer))
    packed = pack(documents, seq_len, pad=tokenizer.eos_token_id or 0)
    if len(packed) == 0:
        raise DataError(f"{path} holds no token to learn: its texts are empty or all of them is prompt.")
    return packed


def pack(documents: Iterable[Tokens], seq_len: int, pad: int) -> PackedData:
    """Documents laid end to end -> blocks of `seq_len` tokens, those without a token to learn left out."""
    # Tensors at once: a list of Python integers takes nine times the memory.
    pairs = [(torch.tensor(d.ids, dtype=torch.int32), torch.tensor(d.learn, dtype=torch.bool)) for d in documents]
    ends = torch.tensor([len(ids) for ids, _ in pairs]).cumsum(0)
    ids = torch.cat([ids for ids, _ in pairs])
    labels = torch.where(torch.cat([learn for _, learn in pairs]), ids, IGNORE)
    missing = -len(ids) % seq_len
    ids = torch.nn.functional.pad(ids, (0, missing), value=pad).view(-1, seq_len)
    labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORE).view(-1, seq_len)
    useful = (labels[:, 1:] != IGNORE).any(dim=1)
    return PackedData(ids[useful], labels[useful], len(pairs), useful.nonzero()[:, 0] * seq_len, ends)


class BlockOrder:
    """An endless order of blocks: every epoch is a permutation of all of them, drawn from (`seed`, epoch).

    `position` counts the blocks taken so far, and is all that has to be stored to go on later. Micro-batches run
    across the end of an epoch, so that each has `batch` blocks.
    """

    def __init__(self, n_blocks: int, seed: int, position: int = 0) -> None:
        self.n_blocks = n_blocks
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[int]:
        """The indices of the next `count` blocks."""
        taken = []
        for _ in range(count):
            epoch, offset = divmod(self.position, self.n_blocks)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            taken.append(self._order[offset])
            self.position += 1
        return taken

    def _permutation(self, epoch: int) -> list[int]:
        # Hashed, so that (seed 1, epoch 0) and (seed 0, epoch 1) share nothing.
        digest = hashlib.sha256(f"blocks {self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(self.n_blocks, generator=generator).tolist()
