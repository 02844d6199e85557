"""CPU path of `paged_attention`: decode, prefill, chunked prefill and tree verify give a row the same bits.

A row's positions are cut into chunks of CHUNK by absolute position. Each chunk has its own maximum, sum of exponentials
and weighted values, always over CHUNK columns, of which hidden ones contribute exactly 0. Chunks are then combined one
after another. So neither chunked prefill nor the batch can change an operand or an order.

Work is laid out as pairs of *tiles* (queries of one sequence that share their keys) and chunks, ordered by the ordinal
of the chunk within its tile. The tiles that have a k-th chunk are then always the first ones, and all steps but the
combination run over all pairs at once. The plan does not depend on the layer and is made once per batch.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.batch import AttentionBatch

CHUNK = 128
"""Positions per chunk. It determines the bits, so it must never depend on the batch."""

BMM_ROWS = 8
"""Multiple to which the rows (and the head size) of a batched float32 product are padded."""

TILE_TOKENS = (1, 8, 32, 64, 128)
"""Queries per tile: a run of new tokens takes the smallest of these sizes that holds it, or several of the largest."""

WAVE_FLOATS = 2**23
"""Approximate number of floats of keys, values and scores in memory at once."""

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of up to `TILE_TOKENS[-1]` consecutive queries of a sequence, or one node of a tree."""

    sequence: int
    first_row: int
    num_rows: int
    first_position: int  # of the first query, along its own path
    prefix: int  # -1 = no tree; else the position at which the tree starts

    def first_chunk(self, window: int | None) -> int:
        """Return the chunk of the lowest position that any query sees."""
        return 0 if window is None else max(0, self.first_position - window + 1) // CHUNK

    def num_chunks(self, window: int | None) -> int:
        """Return the number of chunks from the first one to that of the last query."""
        return (self.first_position + self.num_rows - 1) // CHUNK + 1 - self.first_chunk(window)


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """The pairs of tile and chunk that are computed at once, ordered by ordinal, then tile."""

    tile_of_pair: Tensor | None  # [U]; None = pair u is tile u
    keys: Tensor  # [U * Hkv * n] rows to gather from the cache seen as [..., CHUNK / n * D]
    gathers_blocks: bool  # whether those rows are whole blocks or single positions
    hidden: Tensor  # [U, 1, 1, tokens, CHUNK] bool
    unseen_values: Tensor | None  # rows of the gathered values that no query may see
    counts: tuple[int, ...]  # tiles per ordinal


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The tiles of one size and kind, ordered by falling number of chunks."""

    tokens: int
    gather: Tensor  # [num_tiles * tokens] rows of q
    rows: Tensor  # rows of the output, in order
    kept: Tensor | None  # indices of these among the gathered rows; None = all
    waves: tuple[Wave, ...]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """See `descant_kernels.paged_attention`."""
    out = torch.empty_like(q)
    key = (window, q.shape[1:], k_cache.shape[1:])
    plans = batch.memo.get(key)
    if plans is None:
        plans = batch.memo[key] = list(_make_plans(batch, window, q.shape[1], k_cache))
    for plan in plans:
        out.index_copy_(0, plan.rows, _attend(q, k_cache, v_cache, plan, scale, soft_cap).to(q.dtype))
    return out


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Plan, scale: float, soft_cap: float | None) -> Tensor:
    """Return the attention of a plan's queries: `[len(plan.rows), Hq, D]` float32."""
    num_heads, head_dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    group = num_heads // kv_heads
    queries = q.index_select(0, plan.gather).float().mul_(scale)
    queries = queries.view(-1, plan.tokens, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(-1, kv_heads, group * plan.tokens, head_dim)
    queries = F.pad(queries, (0, -head_dim % BMM_ROWS, 0, -(group * plan.tokens) % BMM_ROWS))
    state: tuple[Tensor, Tensor, Tensor] | None = None
    for wave in plan.waves:
        state = _combine(state, _chunk_sums(queries, k_cache, v_cache, plan.tokens, wave, soft_cap), wave.counts)
    assert state is not None, "a plan has at least one tile"
    _, total, weighted = state
    attended = (weighted / total)[:, :, : group * plan.tokens, :head_dim]
    attended = attended.reshape(-1, kv_heads, group, plan.tokens, head_dim).permute(0, 3, 1, 2, 4)
    attended = attended.reshape(-1, num_heads, head_dim)
    return attended if plan.kept is None else attended.index_select(0, plan.kept)


def _chunk_sums(
    queries: Tensor, k_cache: Tensor, v_cache: Tensor, tokens: int, wave: Wave, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return maximum `[U, Hkv, M, 1]`, sum of exponentials `[U, Hkv, M, 1]` and weighted values `[U, Hkv, M, D]`."""
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    if wave.tile_of_pair is not None:
        queries = queries.index_select(0, wave.tile_of_pair)
    num_pairs, _, num_rows, padded_dim = queries.shape
    row_size = -1 if wave.gathers_blocks else head_dim
    rows = k_cache.shape[0] * kv_heads * (1 if wave.gathers_blocks else k_cache.shape[2])
    keys = k_cache.view(rows, row_size).index_select(0, wave.keys).view(-1, CHUNK, head_dim).float()
    values = v_cache.view(rows, row_size).index_select(0, wave.keys).view(-1, head_dim).float()
    if wave.unseen_values is not None:
        # Weight 0 times a hidden value must be 0 even if the cache holds NaN there.
        values.index_fill_(0, wave.unseen_values, 0.0)
    values = values.view(-1, CHUNK, head_dim)
    if padded_dim != head_dim:
        keys, values = (F.pad(t, (0, padded_dim - head_dim)) for t in (keys, values))
    scores = torch.bmm(queries.reshape(-1, num_rows, padded_dim), keys.transpose(1, 2))
    if soft_cap is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): `exp` gives equal bits anywhere in a tensor, `tanh` does not.
        scores.mul_(2.0 / soft_cap).exp_().add_(1.0).reciprocal_().mul_(-2.0 * soft_cap).add_(soft_cap)
    by_token = scores.view(num_pairs, kv_heads, num_rows // tokens, tokens, CHUNK)
    by_token.masked_fill_(wave.hidden, -torch.inf)
    # Clamped so that the terms of a chunk that is hidden from a row stay finite: all its weights are exactly 0.
    highest = scores.amax(dim=-1, keepdim=True).clamp_(min=LOWEST)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    weighted = torch.bmm(weights, values)
    shape = (num_pairs, kv_heads, num_rows)
    return highest.view(*shape, 1), total.view(*shape, 1), weighted.view(*shape, padded_dim)


def _combine(
    state: tuple[Tensor, Tensor, Tensor] | None, sums: tuple[Tensor, Tensor, Tensor], counts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add chunks to the running softmax of their tiles, one ordinal after another. In place on the state."""
    start = 0
    for count in counts:
        highest, total, weighted = (part[start : start + count] for part in sums)
        start += count
        if state is None:
            state = (highest, total, weighted)
            continue
        all_highest, all_total, all_weighted = (part[:count] for part in state)
        new_highest = torch.maximum(all_highest, highest)
        old_factor = all_highest.sub_(new_highest).exp_()
        new_factor = highest.sub_(new_highest).exp_()
        all_total.mul_(old_factor).add_(total.mul_(new_factor))
        all_weighted.mul_(old_factor).add_(weighted.mul_(new_factor))
        all_highest.copy_(new_highest)
    assert state is not None, "a wave has at least one pair"
    return state


def _make_plans(batch: AttentionBatch, window: int | None, num_heads: int, k_cache: Tensor) -> Iterator[Plan]:
    _, kv_heads, _, head_dim = k_cache.shape
    kinds: dict[tuple[int, bool], list[Tile]] = {}
    for tile in _tiles(batch):
        tokens = next(size for size in TILE_TOKENS if size >= tile.num_rows)
        kinds.setdefault((tokens, tile.prefix >= 0), []).append(tile)
    for (tokens, _), tiles in kinds.items():
        tiles.sort(key=lambda tile: -tile.num_chunks(window))
        pair_floats = num_heads * tokens * (CHUNK + head_dim) + 2 * kv_heads * CHUNK * head_dim
        max_pairs = max(1, WAVE_FLOATS // pair_floats)
        for start in range(0, len(tiles), max_pairs):
            yield _make_plan(batch, window, tiles[start : start + max_pairs], tokens, max_pairs, k_cache)


def _tiles(batch: AttentionBatch) -> Iterator[Tile]:
    depths = None if batch.ancestors is None else (batch.ancestors >= 0).sum(dim=1).tolist()
    bounds = itertools.pairwise(batch.host_cu_seqlens_q)
    for sequence, (start, end) in enumerate(bounds):
        prefix = -1 if batch.host_prefix_lens is None else batch.host_prefix_lens[sequence]
        if depths is not None and prefix >= 0:
            for row in range(start, end):
                yield Tile(sequence, row, 1, prefix + depths[row] - 1, prefix)
            continue
        offset = batch.host_context_lens[sequence] - end
        for row in range(start, end, TILE_TOKENS[-1]):
            yield Tile(sequence, row, min(TILE_TOKENS[-1], end - row), offset + row, -1)


def _make_plan(
    batch: AttentionBatch, window: int | None, tiles: list[Tile], tokens: int, max_pairs: int, k_cache: Tensor
) -> Plan:
    num_chunks = [tile.num_chunks(window) for tile in tiles]
    # Tiles are in order of falling num_chunks, so the tiles that have a k-th chunk are the first counts[k].
    counts = [sum(n > ordinal for n in num_chunks) for ordinal in range(num_chunks[0])]
    waves: list[Wave] = []
    first = 0
    while first < len(counts):
        last, pairs = first + 1, counts[first]
        while last < len(counts) and pairs + counts[last] <= max_pairs:
            pairs += counts[last]
            last += 1
        waves.append(_make_wave(batch, window, tiles, tokens, first, counts[first:last], k_cache))
        first = last
    gather = [tile.first_row + min(i, tile.num_rows - 1) for tile in tiles for i in range(tokens)]
    kept = [index * tokens + i for index, tile in enumerate(tiles) for i in range(tile.num_rows)]
    return Plan(
        tokens=tokens,
        gather=torch.tensor(gather),
        rows=torch.tensor([gather[index] for index in kept]),
        kept=None if len(kept) == len(gather) else torch.tensor(kept),
        waves=tuple(waves),
    )


def _make_wave(
    batch: AttentionBatch,
    window: int | None,
    tiles: list[Tile],
    tokens: int,
    first_ordinal: int,
    counts: list[int],
    k_cache: Tensor,
) -> Wave:
    tile_of_pair = torch.cat([torch.arange(count) for count in counts])
    ordinals = torch.repeat_interleave(torch.arange(first_ordinal, first_ordinal + len(counts)), torch.tensor(counts))
    chunks = torch.tensor([tile.first_chunk(window) for tile in tiles])[tile_of_pair] + ordinals
    first_positions = torch.tensor([tile.first_position for tile in tiles])[tile_of_pair]
    last_rows = torch.tensor([tile.num_rows - 1 for tile in tiles])[tile_of_pair]

    positions = chunks[:, None] * CHUNK + torch.arange(CHUNK)  # [U, CHUNK]
    queries = first_positions[:, None] + torch.minimum(torch.arange(tokens), last_rows[:, None])  # [U, tokens]
    hidden = positions[:, None] > queries[:, :, None]
    if window is not None:
        hidden |= positions[:, None] <= queries[:, :, None] - window
    keys, gathers_blocks = _gather_rows(batch, [tiles[tile] for tile in tile_of_pair.tolist()], positions, k_cache)
    unseen = hidden.all(dim=1)[:, None].expand(-1, k_cache.shape[1], -1).reshape(-1).nonzero().view(-1)
    return Wave(
        tile_of_pair=None if first_ordinal == 0 and len(counts) == 1 else tile_of_pair,
        keys=keys,
        gathers_blocks=gathers_blocks,
        hidden=hidden[:, None, None],
        unseen_values=unseen if len(unseen) else None,
        counts=tuple(counts),
    )


def _gather_rows(batch: AttentionBatch, tiles: list[Tile], positions: Tensor, k_cache: Tensor) -> tuple[Tensor, bool]:
    """Return the cache rows `[U * Hkv * n]` of positions `[U, CHUNK]`, and whether they are whole blocks."""
    _, kv_heads, block_size, _ = k_cache.shape
    heads = torch.arange(kv_heads)[:, None]
    tables = batch.block_tables[torch.tensor([tile.sequence for tile in tiles])].long()  # [U, max_blocks]
    if CHUNK % block_size == 0 and tiles[0].prefix < 0:
        columns = (positions[:, ::block_size] // block_size).clamp(max=tables.shape[1] - 1)
        blocks = tables.gather(1, columns).clamp(min=0)
        return (blocks[:, None] * kv_heads + heads).view(-1), True
    if batch.ancestors is not None and tiles[0].prefix >= 0:
        positions = _path_positions(batch.ancestors, tiles, positions)
    columns = (positions // block_size).clamp(max=tables.shape[1] - 1)
    blocks = tables.gather(1, columns).clamp(min=0)
    return ((blocks[:, None] * kv_heads + heads) * block_size + (positions % block_size)[:, None]).view(-1), False


def _path_positions(ancestors: Tensor, tiles: list[Tile], positions: Tensor) -> Tensor:
    """Return the cache positions of positions along each node's own path."""
    prefixes = torch.tensor([tile.prefix for tile in tiles])[:, None]
    nodes = ancestors[torch.tensor([tile.first_row for tile in tiles])].long()  # [U, max_depth]
    depths = (positions - prefixes).clamp(0, nodes.shape[1] - 1)
    return torch.where(positions < prefixes, positions, nodes.gather(1, depths).clamp(min=0))
