"""CPU path of `add_lora`: weighted sums of the runs in which A and B lie in the arena.

Shrink is, per row, the sum over input features of x[k] times a run of A; expand the sum over ranks of h[r] times runs
of B. Both are `embedding_bag`: it reads the arena in place and in its own dtype, at true ranks, with no loop over
adapters and no copy of their matrices. And as it adds up each sum by itself, one term after another in float32,
a row's bits depend on nothing else in the batch. h and the update are rounded to the arena's dtype, as they are where
A and B are two linear layers.

Which runs a sum takes is a table of indices. Slots whose versions have the same ranks have the same tables but for
where they begin; layers differ in where in a version they lie: that is where the view of the arena begins. So tables
are made once for a batch, not once per layer, and kept while the same adapters meet.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from descant_kernels.batch import LoraTables, Segments
from descant_kernels.pair import ALIGNMENT, PairLayout

TILE = 64
"""Most rows of one call: long segments then share their tables."""

TABLE_BYTES = 64 * 2**20
"""Most bytes of index tables that are kept."""

NUM_TABLES = 1024
"""Most index tables that are kept: enough for every group of projections and shape of adapter of a mixed step."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of y that adapters of a shape touch."""

    column: int  # where it begins in y
    distance: int  # from the first such slice's pair to this one's, in elements
    layout: PairLayout


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Runs to add up, of `width` elements each, counted from where a view of the arena begins."""

    width: int
    runs: Tensor  # [num_terms] int32
    starts: Tensor  # [num_sums] int32, the first term of each sum


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of y, as consecutive as may be, whose slots have the same shape."""

    rows: Tensor | slice
    origins: tuple[int, ...]  # where each row's version begins in the arena


@dataclass(frozen=True, slots=True)
class Shape:
    """What versions of the same ranks share: per module, the rank and the distance from where the version begins."""

    ranks: tuple[int, ...]
    distances: tuple[int, ...]


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
    for shape, tiles in _tiles(tables, segments).items():
        slices = _slices(tables, shape, first_module, x.shape[1], out_sizes)
        if not slices:
            continue
        first = first_module + slices[0][0]
        touched = tuple(slice_ for _, slice_ in slices)
        view = tables.arena[shape.distances[first] :]
        for tile in tiles:
            shrink, expand = _cache.of(touched, tile.origins)
            rows = x[tile.rows]
            h = _shrink(view, rows, shrink)
            delta = _expand(view, h, touched, expand)
            _add(y, delta, touched, tile)
    if _has_row_scales(tables, segments):
        _scale(y, tables, segments, first_module, out_sizes, bias)


def _shrink(view: Tensor, rows: Tensor, sums: Sums) -> Tensor:
    """x @ A.T of all slices side by side, each as wide as its rows of A: `[n, sum(a_stride)]`."""
    num_rows, in_size = rows.shape
    sums_per_row = sums.starts.shape[0] // num_rows
    weights = rows[:, None].expand(num_rows, sums_per_row, in_size).reshape(-1)
    return _weighted_sums(view, weights, sums).view(num_rows, -1)


def _expand(view: Tensor, h: Tensor, slices: tuple[Slice, ...], sums: Sums) -> Tensor:
    """h @ B.T of all slices side by side, each as wide as its rows of B: `[n, sum(b_stride)]`."""
    weights: list[Tensor] = []
    column = 0
    for slice_ in slices:
        layout = slice_.layout
        part = h[:, None, column : column + layout.rank]
        weights.append(part.expand(-1, layout.b_stride // sums.width, -1).flatten(1))
        column += layout.a_stride
    weight = weights[0] if len(weights) == 1 else torch.cat(weights, dim=1)
    return _weighted_sums(view, weight.reshape(-1), sums).view(h.shape[0], -1)


def _weighted_sums(view: Tensor, weights: Tensor, sums: Sums) -> Tensor:
    table = view[: view.shape[0] // sums.width * sums.width].view(-1, sums.width)
    # The positional flags: no scaling by frequency, mode 0 = sum, no sparse gradient.
    return torch.embedding_bag(table, sums.runs, sums.starts, False, 0, False, weights)[0]


def _add(y: Tensor, delta: Tensor, slices: tuple[Slice, ...], tile: Tile) -> None:
    column = 0
    for slice_ in slices:
        out_size = slice_.layout.out_size
        target = y[:, slice_.column : slice_.column + out_size]
        part = delta[:, column : column + out_size]
        if isinstance(tile.rows, slice):
            target[tile.rows] += part
        else:
            target.index_add_(0, tile.rows, part)
        column += slice_.layout.b_stride


def _scale(
    y: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None,
) -> None:
    """Apply row scales to rows that have their update already."""
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


# ---- which rows, which slices, which runs ---------------------------------------------------------------------------


def _tiles(tables: LoraTables, segments: Segments) -> dict[Shape, list[Tile]]:
    """The batch's rows that have an adapter, by the shape of it; the same for every layer."""
    tiles = segments.memo.get(tables)
    if tiles is None:
        rows: dict[Shape, list[tuple[int, int]]] = {}
        for (start, end), slot in zip(pairwise(segments.host_indptr), segments.host_slots, strict=True):
            if slot >= 0 and start < end:
                shape, origin = _shape(tables, slot)
                rows.setdefault(shape, []).extend((row, origin) for row in range(start, end))
        tiles = {
            shape: [_tile(some[at : at + TILE]) for at in range(0, len(some), TILE)] for shape, some in rows.items()
        }
        segments.memo[tables] = tiles
    return tiles


def _tile(rows: list[tuple[int, int]]) -> Tile:
    first, last = rows[0][0], rows[-1][0]
    is_run = last - first + 1 == len(rows)
    indices = slice(first, last + 1) if is_run else torch.tensor([row for row, _ in rows])
    return Tile(indices, tuple(origin for _, origin in rows))


def _shape(tables: LoraTables, slot: int) -> tuple[Shape, int]:
    """The shape of the version in a slot, and where it begins."""
    key = ("shape", slot)
    if key not in tables.memo:
        ranks, offsets = tables.host_ranks[slot], tables.host_offsets[slot]
        origin = min((offset for offset, rank in zip(offsets, ranks, strict=True) if rank), default=0)
        distances = tuple(offset - origin if rank else 0 for offset, rank in zip(offsets, ranks, strict=True))
        tables.memo[key] = Shape(tuple(ranks), distances), origin
    return tables.memo[key]


def _slices(
    tables: LoraTables, shape: Shape, first_module: int, in_size: int, out_sizes: tuple[int, ...]
) -> list[tuple[int, Slice]]:
    """The touched slices of a group of projections, with their numbers."""
    key = (shape, first_module)
    slices = tables.memo.get(key)
    if slices is None:
        slices, column, first = [], 0, None
        for number, out_size in enumerate(out_sizes):
            rank, distance = shape.ranks[first_module + number], shape.distances[first_module + number]
            if rank:
                first = distance if first is None else first
                slices.append((number, Slice(column, distance - first, PairLayout.of(rank, in_size, out_size))))
            column += out_size
        tables.memo[key] = slices
    return slices


class SumsCache:
    """Sums by what they are made for, the least recently used going first. They outlive adapters and batches."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self.num_bytes = 0
        self._sums: OrderedDict[Any, tuple[Sums, Sums]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sums)

    def of(self, slices: tuple[Slice, ...], origins: tuple[int, ...]) -> tuple[Sums, Sums]:
        """Return the sums of shrink and expand for rows whose versions begin at `origins`."""
        key = (slices, origins)
        sums = self._sums.get(key)
        if sums is None:
            begins = torch.tensor(origins, dtype=torch.int64)
            sums = self._sums[key] = _shrink_sums(slices, begins), _expand_sums(slices, begins)
            self.num_bytes += _num_bytes(sums)
            while (self.num_bytes > self._max_bytes and len(self._sums) > 1) or len(self._sums) > self._max_entries:
                self.num_bytes -= _num_bytes(self._sums.popitem(last=False)[1])
        self._sums.move_to_end(key)
        return sums


_cache = SumsCache(TABLE_BYTES, NUM_TABLES)


def _num_bytes(sums: tuple[Sums, Sums]) -> int:
    return sum(part.runs.nbytes + part.starts.nbytes for part in sums)


def _shrink_sums(slices: tuple[Slice, ...], begins: Tensor) -> Sums:
    """Per row and slice, a_stride / width sums of one run per input feature."""
    width = math.gcd(ALIGNMENT, *(slice_.layout.a_stride for slice_ in slices))
    parts = [
        slice_.distance // width + _grid(slice_.layout.a_stride // width, slice_.layout.in_size) for slice_ in slices
    ]
    return _all_rows(width, parts, begins)


def _expand_sums(slices: tuple[Slice, ...], begins: Tensor) -> Sums:
    """Per row and slice, b_stride / width sums of one run per rank."""
    width = math.gcd(ALIGNMENT, *(slice_.layout.b_stride for slice_ in slices))
    parts = [
        (slice_.distance + slice_.layout.b_start) // width + _grid(slice_.layout.b_stride // width, slice_.layout.rank)
        for slice_ in slices
    ]
    return _all_rows(width, parts, begins)


def _grid(num_sums: int, num_terms: int) -> Tensor:
    """Runs of the sums over the rows of a matrix `num_sums` runs wide: `[num_sums, num_terms]`."""
    return torch.arange(num_sums)[:, None] + torch.arange(num_terms) * num_sums


def _all_rows(width: int, parts: list[Tensor], begins: Tensor) -> Sums:
    runs = torch.cat([part.flatten() for part in parts])
    lengths = torch.cat([torch.full((part.shape[0],), part.shape[1]) for part in parts])
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(begins.shape[0])[:, None]
    return Sums(
        width,
        (begins[:, None] // width + runs).flatten().int(),
        (rows * runs.shape[0] + starts).flatten().int(),
    )
