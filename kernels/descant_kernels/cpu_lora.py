"""CPU path of `add_lora`: weighted sums of runs of A and B, read in place from the arena.

Shrink is, per row, the sum over input features of x[k] times a run of A. Expand is the sum over ranks of h[r] times
runs of B. Both are `embedding_bag`, which reads the arena in place, in its own dtype and at true ranks, without a loop
over adapters and without a copy of their matrices. It computes each sum separately, one term after another in float32,
so a row's bits depend on nothing else in the batch. h and the update are rounded to the arena's dtype, as in two linear
layers A and B.

An index table lists the runs of each sum. Slots with versions of equal ranks have the same table, shifted by the
start of the version. Layers differ only in their place within a version, which is the start of the view of the arena.
So a table is made once per batch, not once per layer, and is kept while the same adapters share batches.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from descant_kernels.batch import LoraTables, Segments
from descant_kernels.pair import ALIGNMENT, PairLayout

TILE = 64
"""Maximum rows of one `embedding_bag`. The full tiles of a long segment have equal origins, so they share one table."""

TABLE_BYTES = 64 * 2**20
"""Maximum bytes of index tables that are kept."""

NUM_TABLES = 1024
"""Maximum index tables that are kept: enough for all groups of projections and adapter shapes of a mixed step."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of y that adapters of one shape touch."""

    column: int  # its first column in y
    distance: int  # from the pair of the first touched slice to that of this one, in elements
    layout: PairLayout


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Runs to sum, of `width` elements each and numbered from the start of a view of the arena, with their weights.

    The weights are x (shrink) or h (expand), seen as a matrix `chunk` wide. `sources` lists its rows in the order of
    the terms.
    """

    width: int
    runs: Tensor  # [num_terms] int32
    starts: Tensor  # [num_sums] int32, the first term of each sum
    chunk: int
    sources: Tensor | None  # [num_terms / chunk] int64; None: every row once, in order


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """The sums that add the update of one tile's rows to one group of slices, the same in every layer."""

    shrink: Sums
    expand: Sums
    columns: tuple[tuple[int, int, int], ...]  # first column in y, first column in the update, number of columns


@dataclass(frozen=True, slots=True, eq=False)
class SliceGroup:
    """The touched slices of a group of projections. Compared by identity: equal slices share one object per tables."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Rows of y with adapters of one shape; a `slice` where the rows are consecutive."""

    rows: Tensor | slice
    origins: tuple[int, ...]  # first element of each row's version in the arena
    updates: dict[SliceGroup, Update] = field(init=False, default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The touched slices of one layer's group of projections, and a view of the arena from its first pair on."""

    touched: SliceGroup
    view: Tensor
    runs: dict[int, Tensor] = field(init=False, default_factory=dict)  # the view as runs, by width

    def as_runs(self, width: int) -> Tensor:
        """Return the view as `[N, width]`."""
        if width not in self.runs:
            self.runs[width] = self.view[: self.view.shape[0] // width * width].view(-1, width)
        return self.runs[width]


@dataclass(frozen=True, slots=True)
class Shape:
    """The layout that versions of equal ranks share: per module, the rank and the distance from the version's start."""

    ranks: tuple[int, ...]
    distances: tuple[int, ...]
    groups: dict[int, Group] = field(init=False, default_factory=dict, compare=False)  # by their first module


def add_lora(
    y: Tensor,
    x: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None = None,
) -> None:
    """See `descant_kernels.add_lora`."""
    for shape, tiles in _tiles(tables, segments):
        group = shape.groups.get(first_module)
        if group is None:
            group = shape.groups[first_module] = _group(tables, shape, first_module, x.shape[1], out_sizes)
        touched = group.touched
        for tile in tiles if touched.slices else ():
            update = tile.updates.get(touched)
            if update is None:
                update = tile.updates[touched] = _cache.of(touched.slices, tile.origins)
            h = _weighted_sums(group, x[tile.rows], update.shrink)
            delta = _weighted_sums(group, h, update.expand)
            _add(y, delta.view(len(tile.origins), -1), update, tile)
    if _has_row_scales(tables, segments):
        _scale(y, tables, segments, first_module, out_sizes, bias)


def _weighted_sums(group: Group, weights: Tensor, sums: Sums) -> Tensor:
    """Return the sums, `[num_sums, width]`.

    For shrink they are x @ A.T of all slices side by side, each padded to the width of its rows of A; for expand,
    h @ B.T likewise.
    """
    if sums.sources is not None:
        weights = weights.reshape(-1, sums.chunk).index_select(0, sums.sources)
    # The positional flags: no scaling by frequency, mode 0 = sum, no sparse gradient.
    return torch.embedding_bag(group.as_runs(sums.width), sums.runs, sums.starts, False, 0, False, weights.reshape(-1))[
        0
    ]


def _add(y: Tensor, delta: Tensor, update: Update, tile: Tile) -> None:
    for column, of_delta, size in update.columns:
        part = delta[:, of_delta : of_delta + size]
        if isinstance(tile.rows, slice):
            y[tile.rows, column : column + size].add_(part)
        else:
            y[:, column : column + size].index_add_(0, tile.rows, part)


def _scale(
    y: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None,
) -> None:
    """Apply row scales to rows that already have their update."""
    for (start, end), slot in zip(pairwise(segments.host_indptr), segments.host_slots, strict=True):
        column = 0
        for module, out_size in enumerate(out_sizes, first_module):
            at = tables.host_row_scales[slot][module] if slot >= 0 and tables.host_ranks[slot][module] else -1
            if at >= 0:
                scale = tables.arena[at : at + out_size].float()
                unscaled = 0.0 if bias is None else bias[column : column + out_size].float()
                target = y[start:end, column : column + out_size]
                target.copy_((target.float() - unscaled) * scale + unscaled)
            column += out_size


def _has_row_scales(tables: LoraTables, segments: Segments) -> bool:
    key = (tables, "row scales")
    if key not in segments.memo:
        used = [tables.host_row_scales[slot] for slot in segments.host_slots if slot >= 0]
        segments.memo[key] = any(max(row_scales) >= 0 for row_scales in used)
    return segments.memo[key]


# ---- tiles, slices and runs -----------------------------------------------------------------------------------------


def _tiles(tables: LoraTables, segments: Segments) -> list[tuple[Shape, list[Tile]]]:
    """Return the batch's rows that have an adapter, by the adapter's shape. The same for every layer."""
    tiles = segments.memo.get(tables)
    if tiles is None:
        rows: dict[Shape, list[tuple[int, int]]] = {}
        for (start, end), slot in zip(pairwise(segments.host_indptr), segments.host_slots, strict=True):
            if slot >= 0 and start < end:
                shape, origin = _shape(tables, slot)
                rows.setdefault(shape, []).extend((row, origin) for row in range(start, end))
        tiles = segments.memo[tables] = [
            (shape, [_tile(some[at : at + TILE]) for at in range(0, len(some), TILE)]) for shape, some in rows.items()
        ]
    return tiles


def _tile(rows: list[tuple[int, int]]) -> Tile:
    first, last = rows[0][0], rows[-1][0]
    is_run = last - first + 1 == len(rows)
    indices = slice(first, last + 1) if is_run else torch.tensor([row for row, _ in rows])
    return Tile(indices, tuple(origin for _, origin in rows))


def _shape(tables: LoraTables, slot: int) -> tuple[Shape, int]:
    """Return the shape of the version in a slot, one object for equal shapes, and the version's first element."""
    key = ("shape", slot)
    if key not in tables.memo:
        ranks, offsets = tables.host_ranks[slot], tables.host_offsets[slot]
        origin = min((offset for offset, rank in zip(offsets, ranks, strict=True) if rank), default=0)
        distances = tuple(offset - origin if rank else 0 for offset, rank in zip(offsets, ranks, strict=True))
        shape = Shape(tuple(ranks), distances)
        tables.memo[key] = tables.memo.setdefault(shape, shape), origin
    return tables.memo[key]


def _group(tables: LoraTables, shape: Shape, first_module: int, in_size: int, out_sizes: tuple[int, ...]) -> Group:
    slices: list[Slice] = []
    column, first = 0, None
    for module, out_size in enumerate(out_sizes, first_module):
        rank, distance = shape.ranks[module], shape.distances[module]
        if rank:
            first = distance if first is None else first
            slices.append(Slice(column, distance - first, PairLayout.of(rank, in_size, out_size)))
        column += out_size
    key = tuple(slices)
    return Group(tables.memo.setdefault(("slices", key), SliceGroup(key)), tables.arena[first or 0 :])


class UpdateCache:
    """Updates by slices and origins. The least recently used is evicted first. Entries outlive adapters and batches."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self.num_bytes = 0
        self._updates: OrderedDict[Any, Update] = OrderedDict()

    def __len__(self) -> int:
        return len(self._updates)

    def of(self, slices: tuple[Slice, ...], origins: tuple[int, ...]) -> Update:
        """Return the update of rows with versions that start at `origins`."""
        key = (slices, origins)
        update = self._updates.get(key)
        if update is None:
            begins = torch.tensor(origins, dtype=torch.int64)
            update = Update(_shrink_sums(slices, begins), _expand_sums(slices, begins), _columns(slices))
            self._updates[key] = update
            self.num_bytes += _num_bytes(update)
            while (self.num_bytes > self._max_bytes and len(self._updates) > 1) or len(
                self._updates
            ) > self._max_entries:
                self.num_bytes -= _num_bytes(self._updates.popitem(last=False)[1])
        self._updates.move_to_end(key)
        return update


_cache = UpdateCache(TABLE_BYTES, NUM_TABLES)


def _num_bytes(update: Update) -> int:
    tables = [part for sums in (update.shrink, update.expand) for part in (sums.runs, sums.starts, sums.sources)]
    return sum(table.nbytes for table in tables if table is not None)


def _shrink_sums(slices: tuple[Slice, ...], begins: Tensor) -> Sums:
    """Return, per row and slice, a_stride / width sums of one run per input feature, weighted by the row of x."""
    in_size, width = slices[0].layout.in_size, math.gcd(ALIGNMENT, *(slice_.layout.a_stride for slice_ in slices))
    parts = [
        slice_.distance // width + _grid(slice_.layout.a_stride // width, slice_.layout.in_size) for slice_ in slices
    ]
    return _all_rows(width, parts, begins, in_size, [torch.zeros(len(part), 1, dtype=torch.int64) for part in parts], 1)


def _expand_sums(slices: tuple[Slice, ...], begins: Tensor) -> Sums:
    """Return, per row and slice, b_stride / width sums of one run per rank, weighted by the slice's part of h."""
    layouts = [slice_.layout for slice_ in slices]
    width = math.gcd(ALIGNMENT, *(layout.b_stride for layout in layouts))
    chunk = math.gcd(*(layout.rank for layout in layouts), *(layout.a_stride for layout in layouts))
    parts, sources, column = list[Tensor](), list[Tensor](), 0
    for slice_, layout in zip(slices, layouts, strict=True):
        num_sums = layout.b_stride // width
        parts.append((slice_.distance + layout.b_start) // width + _grid(num_sums, layout.rank))
        sources.append((column // chunk + torch.arange(layout.rank // chunk)).expand(num_sums, -1))
        column += layout.a_stride
    return _all_rows(width, parts, begins, chunk, sources, column // chunk)


def _columns(slices: tuple[Slice, ...]) -> tuple[tuple[int, int, int], ...]:
    """Return the columns of the slices in y and in the update. Slices that adjoin in both are merged."""
    columns: list[tuple[int, int, int]] = []
    of_delta = 0
    for slice_ in slices:
        size = slice_.layout.out_size
        if columns and slice_.column - columns[-1][0] == of_delta - columns[-1][1] == columns[-1][2]:
            columns[-1] = (*columns[-1][:2], columns[-1][2] + size)
        else:
            columns.append((slice_.column, of_delta, size))
        of_delta += slice_.layout.b_stride
    return tuple(columns)


def _grid(num_sums: int, num_terms: int) -> Tensor:
    """Return the runs of sums over the rows of a matrix `num_sums` runs wide: `[num_sums, num_terms]`."""
    return torch.arange(num_sums)[:, None] + torch.arange(num_terms) * num_sums


def _all_rows(
    width: int, parts: list[Tensor], begins: Tensor, chunk: int, sources: list[Tensor], chunks_per_row: int
) -> Sums:
    """Return the sums of all rows from the runs and sources of one row with a version that starts at 0."""
    num_rows = begins.shape[0]
    runs = torch.cat([part.flatten() for part in parts])
    lengths = torch.cat([torch.full((part.shape[0],), part.shape[1]) for part in parts])
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(num_rows)[:, None]
    source = torch.cat([part.flatten() for part in sources])
    is_every_one = len(source) == chunks_per_row and bool((source == torch.arange(chunks_per_row)).all())
    return Sums(
        width,
        (begins[:, None] // width + runs).flatten().int(),
        (rows * runs.shape[0] + starts).flatten().int(),
        chunk,
        None if is_every_one else (rows * chunks_per_row + source).flatten(),
    )
