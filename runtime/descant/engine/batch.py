"""From the rows of a plan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descant.engine.sampling import SamplingRow
from descant.scheduling.plan import NO_ADAPTER, NO_LOGPROBS, Admit, Row
from descant_kernels import AttentionBatch, Segments

_MIN_CAPACITY = 64


class EngineRow:
    """The engine's state of one sequence: its tokens, its blocks, and how much of it is in the cache."""

    def __init__(self, admit: Admit) -> None:
        self.row = admit.row
        self.num_prompt_tokens = admit.num_prompt_tokens
        self.num_computed = admit.num_cached_tokens  # positions whose K/V is valid
        self._sampling = admit
        self._blocks = np.frombuffer(admit.blocks, dtype="<i4")
        prompt_and_output = np.frombuffer(admit.token_ids, dtype="<i4")
        self.num_tokens = len(prompt_and_output)
        self._buffer = np.zeros(max(_MIN_CAPACITY, 2 * self.num_tokens), dtype=np.int64)
        self._buffer[: self.num_tokens] = prompt_and_output

    @property
    def blocks(self) -> NDArray[np.int32]:
        """Block table, `[num_blocks]`."""
        return self._blocks

    @property
    def num_blocks(self) -> int:
        """Length of the block table."""
        return len(self._blocks)

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Token ids of positions `start` to `end`, a view."""
        return self._buffer[start:end]

    def append_token(self, token_id: int) -> None:
        """Add the token that follows the last known one."""
        if self.num_tokens == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        self._buffer[self.num_tokens] = token_id
        self.num_tokens += 1

    def append_blocks(self, blocks: bytes) -> None:
        """Lengthen the block table by packed ids."""
        if blocks:
            self._blocks = np.concatenate([self._blocks, np.frombuffer(blocks, dtype="<i4")])

    def sampling_row(self) -> SamplingRow:
        """What sampling the next token needs to know."""
        admit = self._sampling
        return SamplingRow(
            params=admit.sampling,
            seed=admit.seed,
            choice=admit.choice,
            output_index=self.num_tokens - self.num_prompt_tokens,
            prompt_ids=torch.from_numpy(self.tokens(0, self.num_prompt_tokens)),
            output_ids=torch.from_numpy(self.tokens(self.num_prompt_tokens, self.num_tokens)),
            num_logprobs=admit.num_logprobs,
        )


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """An engine row and its part in this step: positions `start` to `end`, packed from `first_token` on."""

    state: EngineRow
    planned: Row
    start: int
    end: int
    first_token: int

    @property
    def adapter_slot(self) -> int:
        """Slot of the adapter of all its tokens, or `NO_ADAPTER`."""
        return self.planned.spans[0].adapter_slot

    @property
    def is_sampled(self) -> bool:
        """Whether its last known token is among the computed ones."""
        return self.end == self.state.num_tokens

    @property
    def num_scored(self) -> int:
        """How many of its first computed positions are followed by a prompt token whose log-probability is asked."""
        if self.planned.num_prompt_logprobs == NO_LOGPROBS:
            return 0
        return max(0, min(self.end, self.state.num_prompt_tokens - 1) - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """Packed new tokens. Rows of one adapter lie together, those without any last. Letters: see `decoder`."""

    rows: tuple[ScheduledRow, ...]  # in packed order
    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    attention: AttentionBatch
    segments: Segments  # over T tokens
    sampled_rows: tuple[ScheduledRow, ...]  # N of them, in packed order
    sampled_tokens: Tensor  # [N] int64, index of each one's last token
    sampled_segments: Segments  # over N rows of logits

    @classmethod
    def of(cls, rows: Sequence[tuple[EngineRow, Row]], block_size: int, device: torch.device) -> ForwardBatch:
        """Lay out a step. The rows' blocks are already appended and cover their new positions."""
        scheduled = _schedule(rows)
        states = [row.state for row in scheduled]
        query_lens = np.array([row.end - row.start for row in scheduled])
        tables = _block_tables(states)
        owner = np.repeat(np.arange(len(scheduled)), query_lens)  # [T] row of each token
        positions = np.concatenate([np.arange(row.start, row.end) for row in scheduled])
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        sampled = tuple(row for row in scheduled if row.is_sampled)
        last_tokens = np.array([row.first_token + row.end - row.start - 1 for row in sampled], dtype=np.int64)
        input_ids = np.concatenate([row.state.tokens(row.start, row.end) for row in scheduled])
        return cls(
            rows=scheduled,
            input_ids=torch.from_numpy(input_ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            attention=_attention(query_lens, [row.end for row in scheduled], tables, device),
            segments=_segments([(row.adapter_slot, row.end - row.start) for row in scheduled], device),
            sampled_rows=sampled,
            sampled_tokens=torch.from_numpy(last_tokens).to(device),
            sampled_segments=_segments([(row.adapter_slot, 1) for row in sampled], device),
        )


def _schedule(rows: Sequence[tuple[EngineRow, Row]]) -> tuple[ScheduledRow, ...]:
    """Rows in packed order: by adapter slot, `NO_ADAPTER` last, else as planned."""
    ordered = sorted(rows, key=lambda pair: pair[1].spans[0].adapter_slot % 2**31)
    scheduled, first_token = [], 0
    for state, planned in ordered:
        end = state.num_computed + planned.num_new_tokens
        scheduled.append(ScheduledRow(state, planned, state.num_computed, end, first_token))
        first_token += planned.num_new_tokens
    return tuple(scheduled)


def _block_tables(states: Sequence[EngineRow]) -> NDArray[np.int32]:
    tables = np.zeros((len(states), max(state.num_blocks for state in states)), dtype=np.int32)
    for table, state in zip(tables, states, strict=True):
        table[: state.num_blocks] = state.blocks
    return tables


def _attention(
    query_lens: NDArray[np.int64], context_lens: list[int], tables: NDArray[np.int32], device: torch.device
) -> AttentionBatch:
    cu_seqlens_q = (0, *accumulate(query_lens.tolist()))
    return AttentionBatch(
        cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        host_cu_seqlens_q=cu_seqlens_q,
        host_context_lens=tuple(context_lens),
    )


def _segments(lengths: list[tuple[int, int]], device: torch.device) -> Segments:
    """One segment per adapter; rows come sorted, those without one need none."""
    adapters = [
        (slot, sum(length for _, length in group))
        for slot, group in groupby(lengths, key=lambda pair: pair[0])
        if slot != NO_ADAPTER
    ]
    return Segments.of([length for _, length in adapters], [slot for slot, _ in adapters], device)
