# pyright: reportArgumentType=false
# Triton turns launch arguments into constexpr; its annotations do not say so.
"""Triton kernels of `add_lora`: segmented shrink and expand, two launches per group of projections.

One program takes one tile of a segment's rows, so all its rows share one adapter and its true rank is a loop bound.
Long reductions are split along K into a fixed number of parts by input size alone; expand adds the parts in order.
So nothing needs zeroing first, there are no atomics, and a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from descant_kernels.batch import TILE_ROWS, LoraTables, Segments

BLOCK_K = 128
BLOCK_N = 64
SPLIT_SIZE = 1024
"""Input features per part of a split reduction."""
MAX_SPLITS = 8
MAX_BLOCK_R = 64


@triton.jit
def _shrink_kernel(
    # Pointers
    x_ptr,
    arena_ptr,
    h_ptr,
    tiles_ptr,
    offsets_ptr,
    ranks_ptr,
    # Sizes
    in_size,
    split_size,
    num_modules,
    first_module,
    # Strides
    x_stride,
    h_split_stride,
    h_slice_stride,
    h_row_stride,
    # Meta
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[split, slice, rows] = x[rows, part of K] @ A.T[part of K]."""
    tile = tl.program_id(0)
    slice_index = tl.program_id(1)
    split = tl.program_id(2)
    first_row = tl.load(tiles_ptr + tile * 3)
    num_rows = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    entry = slot.to(tl.int64) * num_modules + first_module + slice_index
    rank = tl.load(ranks_ptr + entry)
    a_ptr = arena_ptr + tl.load(offsets_ptr + entry)

    m = tl.arange(0, BLOCK_M)
    rows = (first_row + m).to(tl.int64)
    m_mask = m < num_rows
    k_start = split * split_size
    k_end = tl.minimum(k_start + split_size, in_size)
    h_base = h_ptr + split * h_split_stride + slice_index * h_slice_stride
    for r_start in range(0, rank, BLOCK_R):
        r = r_start + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k_block in range(k_start, k_end, BLOCK_K):
            k = k_block + tl.arange(0, BLOCK_K)
            k_mask = k < k_end
            x = tl.load(
                x_ptr + rows[:, None] * x_stride + k[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0
            )
            a = tl.load(
                a_ptr + r[None, :] * in_size + k[:, None], mask=(r < rank)[None, :] & k_mask[:, None], other=0.0
            )
            acc = tl.dot(x, a, acc, input_precision=PRECISION)
        h = h_base + rows[:, None] * h_row_stride + r[None, :]
        tl.store(h, acc, mask=m_mask[:, None] & (r < rank)[None, :])


@triton.jit
def _expand_kernel(
    # Pointers
    y_ptr,
    arena_ptr,
    h_ptr,
    tiles_ptr,
    offsets_ptr,
    ranks_ptr,
    columns_ptr,
    # Sizes
    in_size,
    num_modules,
    first_module,
    # Strides
    y_stride,
    h_split_stride,
    h_slice_stride,
    h_row_stride,
    # Meta
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[rows, slice] += (sum over splits of h[split, slice, rows]) @ B.T."""
    tile = tl.program_id(0)
    slice_index = tl.program_id(2)
    column = tl.load(columns_ptr + slice_index)
    out_size = tl.load(columns_ptr + slice_index + 1) - column
    first_row = tl.load(tiles_ptr + tile * 3)
    num_rows = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2)
    entry = slot.to(tl.int64) * num_modules + first_module + slice_index
    rank = tl.load(ranks_ptr + entry)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank > 0) & (tl.program_id(1) * BLOCK_N < out_size):
        b_ptr = arena_ptr + tl.load(offsets_ptr + entry) + rank.to(tl.int64) * in_size
        m = tl.arange(0, BLOCK_M)
        rows = (first_row + m).to(tl.int64)
        m_mask = m < num_rows
        n_mask = n < out_size
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r_start in range(0, rank, BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            r_mask = r < rank
            h_ptrs = h_ptr + slice_index * h_slice_stride + rows[:, None] * h_row_stride + r[None, :]
            h_mask = m_mask[:, None] & r_mask[None, :]
            h = tl.load(h_ptrs, mask=h_mask, other=0.0)
            for split in tl.static_range(1, NUM_SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
                h += tl.load(h_ptrs + split * h_split_stride, mask=h_mask, other=0.0)
            b = tl.load(b_ptr + n[None, :] * rank + r[:, None], mask=n_mask[None, :] & r_mask[:, None], other=0.0)
            acc = tl.dot(h.to(b.dtype), b, acc, input_precision=PRECISION)
        y_ptrs = y_ptr + rows[:, None] * y_stride + column + n[None, :]
        y_mask = m_mask[:, None] & n_mask[None, :]
        y = tl.load(y_ptrs, mask=y_mask, other=0.0)
        tl.store(y_ptrs, (y.to(tl.float32) + acc).to(y.dtype), mask=y_mask)


def add_lora(
    y: Tensor, x: Tensor, tables: LoraTables, segments: Segments, first_module: int, out_sizes: tuple[int, ...]
) -> None:
    """See `descant_kernels.add_lora`. Rows of x and y must be contiguous."""
    assert x.stride(1) == y.stride(1) == 1, "features must be contiguous"
    num_tiles, num_slices = segments.tiles.shape[0], len(out_sizes)
    in_size, num_modules = x.shape[1], tables.ranks.shape[1]
    max_rank = _max_rank(tables)
    if num_tiles == 0 or max_rank == 0:
        return
    num_splits = max(1, min(MAX_SPLITS, in_size // SPLIT_SIZE))
    split_size = triton.cdiv(triton.cdiv(in_size, BLOCK_K), num_splits) * BLOCK_K
    block_r = max(16, min(MAX_BLOCK_R, triton.next_power_of_2(max_rank)))
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    h = torch.empty(num_splits, num_slices, x.shape[0], max_rank, dtype=torch.float32, device=x.device)
    _shrink_kernel[(num_tiles, num_slices, num_splits)](
        *(x, tables.arena, h, segments.tiles, tables.offsets, tables.ranks),
        *(in_size, split_size, num_modules, first_module),
        *(x.stride(0), h.stride(0), h.stride(1), h.stride(2)),
        BLOCK_M=TILE_ROWS,
        BLOCK_R=block_r,
        BLOCK_K=BLOCK_K,
        PRECISION=precision,
    )
    _expand_kernel[(num_tiles, triton.cdiv(max(out_sizes), BLOCK_N), num_slices)](
        *(y, tables.arena, h, segments.tiles, tables.offsets, tables.ranks, _columns(tables, out_sizes)),
        *(in_size, num_modules, first_module),
        *(y.stride(0), h.stride(0), h.stride(1), h.stride(2)),
        NUM_SPLITS=num_splits,
        BLOCK_M=TILE_ROWS,
        BLOCK_R=block_r,
        BLOCK_N=BLOCK_N,
        PRECISION=precision,
    )


def _max_rank(tables: LoraTables) -> int:
    """The highest rank of any slot, so that the buffer's size does not depend on the batch."""
    if "max_rank" not in tables.memo:
        tables.memo["max_rank"] = max((rank for ranks in tables.host_ranks for rank in ranks), default=0)
    return tables.memo["max_rank"]


def _columns(tables: LoraTables, out_sizes: tuple[int, ...]) -> Tensor:
    """Columns at which slices start, and the end of the last: `[num_slices + 1]` int32 on the device."""
    if out_sizes not in tables.memo:
        starts = torch.tensor((0, *out_sizes)).cumsum(0).int()
        tables.memo[out_sizes] = starts.to(tables.arena.device)
    return tables.memo[out_sizes]
