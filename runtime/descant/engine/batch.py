"""The tensors of one forward pass, made from the rows of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from descant.contract.plan import NO_ADAPTER, NO_LOGPROBS, Admit, Row
from descant.engine.sampling import SamplingRow
from descant.engine.tree import TokenTree, ancestors
from descant.engine.uploads import upload_fields
from descant_client.protocol import SamplingParams
from descant_kernels import AttentionBatch, Segments

_MIN_CAPACITY = 64
_KNOWN = -1  # the source of a token that the host knows


class PendingTokens:
    """Tokens on the device that steps in flight sampled. Later steps read them before the host knows them.

    There is one lane of `max_rows` tokens per step in flight, and lanes are used in turn. A token's *source* is its
    index.
    """

    def __init__(self, num_lanes: int, max_rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_lanes * max_rows, dtype=torch.int64, device=device)  # [num_lanes * max_rows]
        self._num_lanes = num_lanes
        self._max_rows = max_rows
        self._lane = 0

    def put(self, token_ids: Tensor) -> range:
        """Store a step's sampled tokens, `[N]` int64 with N <= max_rows, in the next lane; return their sources."""
        first = self._lane * self._max_rows
        self._lane = (self._lane + 1) % self._num_lanes
        sources = range(first, first + len(token_ids))
        self.tokens[sources.start : sources.stop].copy_(token_ids)
        return sources

    def fill_in(self, input_ids: Tensor, sources: Tensor) -> Tensor:
        """Return `input_ids` with each token that has a source filled in. All three tensors are `[T]` int64."""
        return torch.where(sources == _KNOWN, input_ids, self.tokens[sources.clamp(min=0)])


class EngineRow:
    """The engine's state of one sequence: its tokens, its blocks, and the number of its positions in the cache.

    All counts include the steps launched so far. A token sampled by a step in flight is *pending*: it is counted, but
    only its source is known.
    """

    def __init__(self, admit: Admit) -> None:
        self.row = admit.row
        self.num_prompt_tokens = admit.num_prompt_tokens
        self.num_computed = admit.num_cached_tokens  # positions with valid K/V
        self.error: str | None = None  # reason why the row is lost; steps planned before the error still contain it
        self._pending: dict[int, int] = {}  # position -> source
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
        """Return the token ids of positions `start` to `end`, as a view."""
        return self._buffer[start:end]

    @property
    def sampling(self) -> SamplingParams:
        """Sampling parameters of the sequence."""
        return self._sampling.sampling

    def append_token(self, token_id: int) -> None:
        """Append a token that the host knows."""
        if self.num_tokens == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros_like(self._buffer)])
        self._buffer[self.num_tokens] = token_id
        self.num_tokens += 1

    def append_pending(self, source: int) -> None:
        """Append a token that only the device knows."""
        self._pending[self.num_tokens] = source
        self.append_token(0)

    def learn(self, position: int, token_id: int) -> None:
        """Set the id of a pending token, or append a token at the next position."""
        if position == self.num_tokens:
            self.append_token(token_id)
        else:
            del self._pending[position]
            self._buffer[position] = token_id

    @property
    def has_pending(self) -> bool:
        """Whether any token is pending."""
        return bool(self._pending)

    def source(self, position: int) -> int:
        """Return the source of a pending token; -1 for a token that the host knows."""
        return self._pending.get(position, _KNOWN)

    def append_blocks(self, blocks: bytes) -> None:
        """Append packed block ids to the block table."""
        if blocks:
            self._blocks = np.concatenate([self._blocks, np.frombuffer(blocks, dtype="<i4")])

    def sampling_row(self, drafted: Sequence[int] = ()) -> SamplingRow:
        """Return the sampling inputs of the next token, or of the one after it and the `drafted` tokens."""
        admit, output_ids = self._sampling, self.tokens(self.num_prompt_tokens, self.num_tokens)
        if drafted:
            output_ids = np.concatenate([output_ids, np.array(drafted, dtype=np.int64)])
        return SamplingRow(
            params=admit.sampling,
            seed=admit.seed,
            choice=admit.choice,
            output_index=len(output_ids),
            prompt_ids=torch.from_numpy(self.tokens(0, self.num_prompt_tokens)),
            output_ids=torch.from_numpy(output_ids),
            num_logprobs=admit.num_logprobs,
        )


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """An engine row and its part of a step: positions `start` to `end`, packed from index `first_token` on.

    The nodes of its draft follow these positions, both in the batch and in the cache.
    """

    state: EngineRow
    planned: Row
    start: int
    end: int
    first_token: int
    tree: TokenTree  # of one node where there is no draft

    @property
    def adapter_slot(self) -> int:
        """Adapter slot of all its tokens, or `NO_ADAPTER`."""
        return self.planned.spans[0].adapter_slot

    @property
    def is_sampled(self) -> bool:
        """Whether the step computes its last known token, so that the next one is sampled."""
        return self.end == self.state.num_tokens

    @property
    def num_packed(self) -> int:
        """Number of its tokens in the batch."""
        return self.end - self.start + self.tree.num_drafted

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """Its tokens in the batch, `[num_packed]`; 0 for pending ones."""
        known = self.state.tokens(self.start, self.end)
        return (
            np.concatenate([known, np.array(self.tree.draft_ids, dtype=np.int64)]) if self.tree.num_drafted else known
        )

    @property
    def positions(self) -> NDArray[np.int64]:
        """Positions of its tokens in the text, `[num_packed]`."""
        return np.concatenate([np.arange(self.start, self.end), self.end - 1 + self.tree.depths[1:]])

    def sampling_rows(self) -> list[SamplingRow]:
        """Return the sampling inputs of each of its nodes."""
        return [self.state.sampling_row(self.tree.path_tokens(node)) for node in range(len(self.tree.paths))]

    @property
    def num_scored(self) -> int:
        """Number of leading computed positions followed by a prompt token with requested log-probabilities."""
        if self.planned.num_prompt_logprobs == NO_LOGPROBS:
            return 0
        return max(0, min(self.end, self.state.num_prompt_tokens - 1) - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """The packed new tokens of a step. Rows are grouped by adapter, those without one last. Letters: see `decoder`."""

    rows: tuple[ScheduledRow, ...]  # in packed order
    input_ids: Tensor  # [T] int64, 0 for pending tokens
    sources: Tensor | None  # [T] int64, source of each pending token, -1 for known ones; None = no token is pending
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    attention: AttentionBatch
    segments: Segments  # over T tokens
    sampled_rows: tuple[ScheduledRow, ...]  # in packed order; their trees have N nodes in total
    sampled_tokens: Tensor  # [N] int64, index of each node's token
    sampled_segments: Segments  # over N rows of logits

    @property
    def is_decode(self) -> bool:
        """Whether every row computes one token, without a draft, and is sampled."""
        return len(self.sampled_rows) == len(self.input_ids)

    @classmethod
    def of(cls, rows: Sequence[tuple[EngineRow, Row]], block_size: int, device: torch.device) -> ForwardBatch:
        """Lay out a step on a device. The rows' blocks must already be appended and cover their new positions."""
        return cls._on_host(rows, block_size).to(device)

    def to(self, device: torch.device) -> ForwardBatch:
        """Copy a batch from the CPU to a device, in one transfer, without blocking the host."""
        if device.type == "cpu":
            return self
        assert self.attention.ancestors is None, "drafts are verified where steps are not queued"
        batch, attention, segments, sampled_segments = upload_fields(
            (self, self.attention, self.segments, self.sampled_segments), device
        )
        return replace(batch, attention=attention, segments=segments, sampled_segments=sampled_segments)

    @classmethod
    def _on_host(cls, rows: Sequence[tuple[EngineRow, Row]], block_size: int) -> ForwardBatch:
        scheduled = _schedule(rows)
        states = [row.state for row in scheduled]
        query_lens = np.array([row.num_packed for row in scheduled])
        tables = _block_tables(states)
        owner = np.repeat(np.arange(len(scheduled)), query_lens)  # [T] row of each token
        places = np.concatenate([np.arange(row.start, row.start + row.num_packed) for row in scheduled])
        slots = tables[owner, places // block_size].astype(np.int64) * block_size + places % block_size
        sampled = tuple(row for row in scheduled if row.is_sampled)
        sampled_tokens = [
            np.arange(row.first_token + row.end - row.start - 1, row.first_token + row.num_packed) for row in sampled
        ]
        return cls(
            rows=scheduled,
            input_ids=torch.from_numpy(np.concatenate([row.input_ids for row in scheduled])),
            sources=_sources(scheduled),
            positions=torch.from_numpy(np.concatenate([row.positions for row in scheduled])),
            slot_mapping=torch.from_numpy(slots),
            attention=_attention(query_lens, scheduled, tables),
            segments=_segments([(row.adapter_slot, row.num_packed) for row in scheduled]),
            sampled_rows=sampled,
            sampled_tokens=torch.from_numpy(np.concatenate(sampled_tokens or [np.empty(0, dtype=np.int64)])),
            sampled_segments=_segments([(row.adapter_slot, len(row.tree.paths)) for row in sampled]),
        )


def _schedule(rows: Sequence[tuple[EngineRow, Row]]) -> tuple[ScheduledRow, ...]:
    """Return the rows in packed order: by adapter slot, `NO_ADAPTER` last, otherwise as planned."""
    ordered = sorted(rows, key=lambda pair: pair[1].spans[0].adapter_slot % 2**31)
    scheduled, first_token = [], 0
    for state, planned in ordered:
        end = state.num_computed + planned.num_new_tokens
        tree = TokenTree.of(planned.draft)
        scheduled.append(ScheduledRow(state, planned, state.num_computed, end, first_token, tree))
        first_token += scheduled[-1].num_packed
    return tuple(scheduled)


def _sources(rows: Sequence[ScheduledRow]) -> Tensor | None:
    if not any(row.state.has_pending for row in rows):
        return None
    return torch.tensor([row.state.source(position) for row in rows for position in range(row.start, row.end)])


def _block_tables(states: Sequence[EngineRow]) -> NDArray[np.int32]:
    tables = np.zeros((len(states), max(state.num_blocks for state in states)), dtype=np.int32)
    for table, state in zip(tables, states, strict=True):
        table[: state.num_blocks] = state.blocks
    return tables


def _attention(
    query_lens: NDArray[np.int64], rows: Sequence[ScheduledRow], tables: NDArray[np.int32]
) -> AttentionBatch:
    cu_seqlens_q = (0, *accumulate(query_lens.tolist()))
    context_lens = [row.start + row.num_packed for row in rows]
    prefix_lens = [row.start if row.tree.num_drafted else -1 for row in rows]  # -1: no tree
    has_trees = max(prefix_lens) >= 0
    return AttentionBatch(
        cu_seqlens_q=torch.tensor(cu_seqlens_q, dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        host_cu_seqlens_q=cu_seqlens_q,
        host_context_lens=tuple(context_lens),
        ancestors=torch.from_numpy(_ancestors(rows)) if has_trees else None,
        prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32) if has_trees else None,
        host_prefix_lens=tuple(prefix_lens) if has_trees else None,
    )


def _ancestors(rows: Sequence[ScheduledRow]) -> NDArray[np.int32]:
    """Return `AttentionBatch.ancestors`. Rows without a draft are ignored there."""
    trees = [row for row in rows if row.tree.num_drafted]
    nodes = ancestors([row.tree for row in trees], [row.start for row in trees])
    table = np.full((sum(row.num_packed for row in rows), nodes.shape[1]), -1, dtype=np.int32)
    first = 0
    for row in trees:
        table[row.first_token : row.first_token + row.num_packed] = nodes[first : first + row.num_packed]
        first += row.num_packed
    return table


def _segments(lengths: list[tuple[int, int]]) -> Segments:
    """Return one segment per adapter from rows sorted by adapter. Rows without one, at the end, have no segment."""
    adapters = [
        (slot, sum(length for _, length in group))
        for slot, group in groupby(lengths, key=lambda pair: pair[0])
        if slot != NO_ADAPTER
    ]
    return Segments.of([length for _, length in adapters], [slot for slot, _ in adapters])
