"""The model of the fake engine: tokens that depend on everything they should depend on, and log-probabilities."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from descant.contract.plan import Admit, LogprobRows, pack_floats, pack_ints

PRIME = 2**61 - 1


@dataclass
class FakeRow:
    """What the engine keeps of a sequence."""

    admit: Admit
    tokens: list[int]
    blocks: list[int]
    num_computed: int

    @property
    def output_index(self) -> int:
        return len(self.tokens) - self.admit.num_prompt_tokens


Behavior = Callable[[FakeRow, int], int]


def echo(row: FakeRow, history: int) -> int:
    """Say the prompt again and again."""
    return row.tokens[row.output_index % row.admit.num_prompt_tokens]


def counter(row: FakeRow, history: int) -> int:
    """Count from 0."""
    return row.output_index


def hash_history(row: FakeRow, history: int) -> int:
    """Depend on every token so far, the adapter, the seed and the choice."""
    return extend_history(history, row.admit.seed, str(row.admit.choice)) % 997


def extend_history(history: int, token_id: int, adapter: str) -> int:
    """Return a number that stands for a history, a token and the adapter that read it."""
    return (history * 1000003 + (token_id + 1) * 2654435761 + zlib.crc32(adapter.encode()) + 1) % PRIME


def logprob_rows(histories: list[int], num_top: int) -> LogprobRows:
    """Return made-up log-probabilities that depend on the histories."""
    num_top = max(0, num_top)
    chosen = [-float(history % 1024) for history in histories]
    top_ids = [(history + i) % 997 for history in histories for i in range(num_top)]
    return LogprobRows(
        len(histories), num_top, pack_floats(chosen), pack_ints(top_ids), pack_floats(map(float, top_ids))
    )
