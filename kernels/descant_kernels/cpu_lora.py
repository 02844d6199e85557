"""CPU path of `add_lora`: many adapters in few products, every row bitwise independent of its batch.

All products have one shape per adapter: `[TILE, in] @ [in, R]` and `[TILE, R] @ [R, out]` in float32, batched over
tiles of rows; a segment shorter than a tile is padded. As nothing about the shape depends on the batch, neither do
the bits. Ranks are padded with zeros to a power of two, so that adapters of like rank share a batched product.
The padded matrices of the slots in use are kept with the tables, within a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.batch import LoraTables, Segments

TILE = 8
"""Rows of every product."""

MIN_WIDTH = 16
"""Fewest columns of every product: below, rows of one tile were measured to differ."""

CACHE_BYTES = 256 * 2**20
"""Most bytes of padded matrices kept with one `LoraTables`."""


@dataclass(frozen=True, slots=True, eq=False)
class TileGroup:
    """Tiles of rows whose adapters have the same padded ranks, multiplied in one batch.

    Either one tile of each of `slots`, or several tiles of a single slot.
    """

    slots: tuple[int, ...]
    ranks: tuple[int, ...]  # padded, one per slice
    gather: Tensor  # [num_tiles * TILE] rows of x, padding repeats a row
    kept: Tensor | None  # rows of the product that are no padding; None = all
    rows: Tensor  # rows of y that they belong to


@dataclass(frozen=True, slots=True, eq=False)
class PaddedMatrices:
    """Float32 matrices of a group's slots: shrink of all slices side by side, expand of each slice."""

    shrink: Tensor  # [num_slots, in, sum(ranks)]
    expand: tuple[Tensor | None, ...]  # [num_slots, rank, max(out, MIN_WIDTH)] each


def padded_rank(rank: int) -> int:
    """Zero, or the power of two from MIN_WIDTH up that holds the rank."""
    return 0 if rank == 0 else max(MIN_WIDTH, 1 << (rank - 1).bit_length())


def add_lora(
    y: Tensor, x: Tensor, tables: LoraTables, segments: Segments, first_module: int, out_sizes: tuple[int, ...]
) -> None:
    """See `descant_kernels.add_lora`."""
    for group in _groups(tables, segments, first_module, len(out_sizes)):
        matrices = _matrices(tables, group.slots, group.ranks, first_module, x.shape[1], out_sizes)
        num_tiles = group.gather.shape[0] // TILE
        tiles = x.index_select(0, group.gather).float().view(num_tiles, TILE, -1)
        shrunk = torch.bmm(tiles, matrices.shrink.expand(num_tiles, -1, -1))
        column, h_column = 0, 0
        for out_size, rank, expand in zip(out_sizes, group.ranks, matrices.expand, strict=True):
            if expand is not None:
                h = shrunk[:, :, h_column : h_column + rank]
                delta = torch.bmm(h, expand.expand(num_tiles, -1, -1)).view(num_tiles * TILE, -1)
                _add_rows(y[:, column : column + out_size], delta[:, :out_size], group)
            column += out_size
            h_column += rank


def _add_rows(y: Tensor, delta: Tensor, group: TileGroup) -> None:
    if group.kept is not None:
        delta = delta.index_select(0, group.kept)
    if y.dtype == delta.dtype:
        y.index_add_(0, group.rows, delta)
    else:
        y.index_copy_(0, group.rows, (y.index_select(0, group.rows) + delta).to(y.dtype))


def _groups(tables: LoraTables, segments: Segments, first_module: int, num_slices: int) -> list[TileGroup]:
    """Tile groups of the batch; layers whose adapters have the same ranks share them."""
    last_module = first_module + num_slices
    ranks = tuple(
        () if slot < 0 else tuple(tables.host_ranks[slot][first_module:last_module]) for slot in segments.host_slots
    )
    groups = segments.memo.get(ranks)
    if groups is None:
        groups = segments.memo[ranks] = _make_groups(segments, ranks)
    return groups


def _make_groups(segments: Segments, ranks: Sequence[tuple[int, ...]]) -> list[TileGroup]:
    short: dict[tuple[int, ...], list[tuple[int, range]]] = {}
    groups: list[TileGroup] = []
    for index, slot in enumerate(segments.host_slots):
        rows = range(segments.host_indptr[index], segments.host_indptr[index + 1])
        padded = tuple(padded_rank(rank) for rank in ranks[index])
        if slot < 0 or not rows or not any(padded):
            continue
        if len(rows) <= TILE:
            short.setdefault(padded, []).append((slot, rows))
        else:
            tiles = [rows[start : start + TILE] for start in range(0, len(rows), TILE)]
            groups.append(_make_group((slot,), padded, tiles))
    for padded, members in short.items():
        slots = tuple(slot for slot, _ in members)
        # One slot many times over needs its matrices once.
        slots = slots[:1] if len(set(slots)) == 1 else slots
        groups.append(_make_group(slots, padded, [rows for _, rows in members]))
    return groups


def _make_group(slots: tuple[int, ...], ranks: tuple[int, ...], tiles: Sequence[range]) -> TileGroup:
    gather = [row for tile in tiles for row in (*tile, *([tile[0]] * (TILE - len(tile))))]
    kept = [index * TILE + row for index, tile in enumerate(tiles) for row in range(len(tile))]
    return TileGroup(
        slots=slots,
        ranks=ranks,
        gather=torch.tensor(gather),
        kept=None if len(kept) == len(gather) else torch.tensor(kept),
        rows=torch.tensor([row for tile in tiles for row in tile]),
    )


def _matrices(
    tables: LoraTables,
    slots: tuple[int, ...],
    ranks: tuple[int, ...],
    first_module: int,
    in_size: int,
    out_sizes: tuple[int, ...],
) -> PaddedMatrices:
    key = (first_module, slots)
    matrices = tables.memo.get(key)
    if matrices is None:
        matrices = _make_matrices(tables, slots, ranks, first_module, in_size, out_sizes)
        num_bytes = sum(m.nbytes for m in (matrices.shrink, *matrices.expand) if m is not None)
        if tables.memo.get("bytes", 0) + num_bytes > CACHE_BYTES:
            tables.memo.clear()
        tables.memo[key] = matrices
        tables.memo["bytes"] = tables.memo.get("bytes", 0) + num_bytes
    return matrices


def _make_matrices(
    tables: LoraTables,
    slots: tuple[int, ...],
    ranks: tuple[int, ...],
    first_module: int,
    in_size: int,
    out_sizes: tuple[int, ...],
) -> PaddedMatrices:
    shrink: list[Tensor] = []
    expand: list[Tensor | None] = []
    for module, (padded, out_size) in enumerate(zip(ranks, out_sizes, strict=True), first_module):
        if padded == 0:
            expand.append(None)
            continue
        pairs = [_adapter_matrices(tables, slot, module, in_size, out_size) for slot in slots]
        shrink.append(torch.stack([F.pad(a.T, (0, padded - a.shape[0])) for a, _ in pairs]))
        missing = max(0, MIN_WIDTH - out_size)
        expand.append(torch.stack([F.pad(b.T, (0, missing, 0, padded - b.shape[1])) for _, b in pairs]))
    return PaddedMatrices(torch.cat(shrink, dim=2), tuple(expand))


def _adapter_matrices(tables: LoraTables, slot: int, module: int, in_size: int, out_size: int) -> tuple[Tensor, Tensor]:
    rank, offset = tables.host_ranks[slot][module], tables.host_offsets[slot][module]
    middle = offset + rank * in_size
    a = tables.arena[offset:middle].view(rank, in_size)
    b = tables.arena[middle : middle + out_size * rank].view(out_size, rank)
    return a.float(), b.float()
