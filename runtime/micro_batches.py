"""Micro-batches that fit: a batch of any size is split by rows, and split again where memory runs out."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import MemoryBudgetError
from .data import Batch, count_loss_tokens
from .step_memory import StepMemory

# in a plain RuntimeError: torch's CPU allocator; the CUDA driver where a kernel is loaded, cuBLAS for its workspace
_MESSAGES = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("out of memory", "ALLOC_FAILED"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the machine ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


class MicroBatches:
    """Splits batches by rows so that none has more than `most_tokens` tokens (None: no limit is known yet), nor needs
    more than `memory` allows."""

    def __init__(self, memory: StepMemory | None = None) -> None:
        self.most_tokens: int | None = None
        self.memory = memory

    def split(self, batches: Iterable[Batch]) -> list[Batch]:
        """Every row once, in order. Parts without a token to learn are left out: their mean loss is 0 / 0."""
        parts = []
        for batch in batches:
            rows, seq_len = batch.input_ids.shape
            size = rows if self.memory is None else self.memory.room(rows, seq_len).rows
            size = size if self.most_tokens is None else max(1, min(size, self.most_tokens // seq_len))
            for at in range(0, rows, size):
                labels = batch.labels[at : at + size]
                tokens = batch.loss_tokens if size == rows else count_loss_tokens(labels)
                if tokens:
                    parts.append(Batch(batch.input_ids[at : at + size], labels, tokens))
        return parts

    def without_pages(self, batches: Iterable[Batch]) -> bool:
        """Whether `memory` has room for these only where a paged optimizer's pages are on the host."""
        memory = self.memory
        return memory is not None and any(memory.room(*batch.input_ids.shape).without_pages for batch in batches)

    def shrink(self, batch: Batch) -> None:
        """After `batch` did not fit: half of its rows from now on. Raises MemoryBudgetError for a single row."""
        rows, seq_len = batch.input_ids.shape
        if rows == 1:
            raise MemoryBudgetError(
                f"One sequence of {seq_len} tokens does not fit the memory, even with the optimizer's pages sent out: give "
                "a smaller seq_len, or an activation_budget below 1."
            )
        self.most_tokens = (rows // 2) * seq_len
