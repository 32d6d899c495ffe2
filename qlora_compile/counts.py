"""How many sequences and tokens a step may have: a mistyped number is a sentence, not a machine without memory."""

from __future__ import annotations

from .errors import ConfigError

MOST_SEQUENCES = 1 << 20
MOST_TOKENS = 1 << 24  # of one sequence


def check_counts(batch: int, seq_len: int) -> None:
    """Raises ConfigError naming the one that no step can have."""
    for name, number, most in (("batch", batch, MOST_SEQUENCES), ("seq_len", seq_len, MOST_TOKENS)):
        if not 1 <= number <= most:
            raise ConfigError(f"{name} must be from 1 to {most}, got {number}.")
