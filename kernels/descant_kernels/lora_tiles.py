# pyright: reportArgumentType=false
# Triton turns launch arguments into constexpr; its annotations do not allow that.
"""The Triton kernels of `add_lora`. A program takes one tile: rows of one segment, which share an adapter and ranks.

The order of a row's sums does not depend on how the work is cut. Input features are summed in parts of `part_size`, one
block of `BLOCK_K` after another, and the parts one after another. Ranks are summed one block after another; the size of
the blocks depends on the adapter's own rank. So the same numbers are added in the same order whether parts are spread
over programs (`shrink_kernel` with several planes), computed by one program (one plane) or computed again for each
block of columns (`fused_kernel`). There are no atomics, and no memory needs to be zeroed first.

Padding in the arena may hold any values: padding of A only reaches ranks, and padding of B only columns, that are
discarded. So loads are masked at the end of the padding, not at its start: the masks then cover whole vectors.

`expand_kernel` and `fused_kernel` issue the loads of the table entries and of y before they check whether the module
has a rank. On an H100 the latency of memory is most of a small batch's time.
"""

import triton
import triton.language as tl

from descant_kernels.pair import ALIGNMENT, OUT_STEP, RANK_STEP

_RANK_STEP = tl.constexpr(RANK_STEP)
_OUT_STEP = tl.constexpr(OUT_STEP)
_ALIGNMENT = tl.constexpr(ALIGNMENT)

BLOCK_R = tl.constexpr(64)
"""Ranks in a block of an adapter with a rank above `SMALL_RANK`."""
SMALL_RANK = tl.constexpr(16)
"""Highest rank that takes a single block, and the number of ranks in that block."""


@triton.jit
def shrink_kernel(
    # Pointers
    x_ptr,
    arena_ptr,
    h_ptr,
    tiles_ptr,
    offsets_ptr,
    ranks_ptr,
    # Sizes
    in_size,
    part_size,
    program_size,
    num_slices,
    num_modules,
    first_module,
    # Strides
    x_stride,
    h_plane_stride,
    h_slice_stride,
    h_row_stride,
    # Meta
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store h[plane, slice, rows] = x[rows] @ A.T over the plane's `program_size` features.

    Grid: (tiles, slices * programs that share the blocks of ranks, planes). For rank 0 nothing is stored.
    """
    tile = tl.program_id(0)
    slice_index = tl.program_id(1) % num_slices
    rank_program = tl.program_id(1) // num_slices
    plane = tl.program_id(2)
    rows, num_rows, entry = _rows_and_entry(tiles_ptr, tile, num_modules, first_module + slice_index, BLOCK_M)
    if num_rows == 0:  # padding: in a CUDA graph the grid has room for more tiles than the batch has
        return
    m_mask = _up_to(num_rows, BLOCK_M)
    rank = tl.load(ranks_ptr + entry)
    a_ptr = arena_ptr + tl.multiple_of(tl.load(offsets_ptr + entry), _ALIGNMENT)
    x_ptrs = x_ptr + rows * x_stride
    h_ptrs = h_ptr + plane * h_plane_stride + slice_index * h_slice_stride + rows * h_row_stride
    k_start = plane * program_size
    k_end = tl.minimum(k_start + program_size, in_size)
    if rank <= SMALL_RANK:
        if (rank_program == 0) & (rank > 0):
            h = _shrink(x_ptrs, a_ptr, m_mask, 0, rank, k_start, k_end, part_size, BLOCK_M, SMALL_RANK, BLOCK_K)
            _store_h(h_ptrs, h, m_mask, 0, rank, SMALL_RANK)
    else:
        num_rank_programs = tl.num_programs(1) // num_slices
        for r_start in range(rank_program * BLOCK_R, rank, num_rank_programs * BLOCK_R):
            h = _shrink(x_ptrs, a_ptr, m_mask, r_start, rank, k_start, k_end, part_size, BLOCK_M, BLOCK_R, BLOCK_K)
            _store_h(h_ptrs, h, m_mask, r_start, rank, BLOCK_R)


@triton.jit
def expand_kernel(
    # Pointers
    y_ptr,
    arena_ptr,
    h_ptr,
    bias_ptr,
    tiles_ptr,
    columns_ptr,
    offsets_ptr,
    ranks_ptr,
    row_scales_ptr,
    # Sizes
    in_size,
    num_modules,
    first_module,
    # Strides
    y_stride,
    h_plane_stride,
    h_slice_stride,
    h_row_stride,
    # Meta
    NUM_PLANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OUT_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute y[rows, slice] += (sum over planes of h[plane, slice, rows]) @ B.T. Grid: (tiles, blocks of columns)."""
    tile = tl.program_id(0)
    slice_index, n, out_size, column = _columns(columns_ptr, tl.program_id(1), OUT_MULTIPLE, BLOCK_N)
    rows, num_rows, entry = _rows_and_entry(tiles_ptr, tile, num_modules, first_module + slice_index, BLOCK_M)
    if num_rows == 0:
        return
    m_mask = _up_to(num_rows, BLOCK_M)
    y_ptrs = y_ptr + rows * y_stride + column + n[None, :]
    y = tl.load(y_ptrs, mask=m_mask & (n < out_size)[None, :], other=0.0)
    rank = tl.load(ranks_ptr + entry)
    scale_start = tl.load(row_scales_ptr + entry)
    b_ptr = _b(arena_ptr, offsets_ptr + entry, rank, in_size)
    if rank == 0:
        return
    h_ptrs = h_ptr + slice_index * h_slice_stride + rows * h_row_stride
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if rank <= SMALL_RANK:
        b = _load_b(b_ptr, n, 0, rank, out_size, SMALL_RANK)
        h = _load_h(h_ptrs, h_plane_stride, m_mask, 0, rank, NUM_PLANES, BLOCK_M, SMALL_RANK)
        delta = _expand(delta, h, b, 0, rank, SMALL_RANK)
    else:
        for r_start in range(0, rank, BLOCK_R):
            h = _load_h(h_ptrs, h_plane_stride, m_mask, r_start, rank, NUM_PLANES, BLOCK_M, BLOCK_R)
            delta = _expand(delta, h, _load_b(b_ptr, n, r_start, rank, out_size, BLOCK_R), r_start, rank, BLOCK_R)
    _add(y_ptrs, y, delta, m_mask, n, out_size, arena_ptr, scale_start, bias_ptr + column, HAS_BIAS)


@triton.jit
def fused_kernel(
    # Pointers
    y_ptr,
    x_ptr,
    arena_ptr,
    bias_ptr,
    tiles_ptr,
    columns_ptr,
    offsets_ptr,
    ranks_ptr,
    row_scales_ptr,
    # Sizes
    in_size,
    part_size,
    num_modules,
    first_module,
    # Strides
    y_stride,
    x_stride,
    # Meta
    HAS_BIAS: tl.constexpr,
    OUT_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute y[rows, slice] += (x[rows] @ A.T) @ B.T, with h per block of columns. Grid: as `expand_kernel`."""
    tile = tl.program_id(0)
    slice_index, n, out_size, column = _columns(columns_ptr, tl.program_id(1), OUT_MULTIPLE, BLOCK_N)
    rows, num_rows, entry = _rows_and_entry(tiles_ptr, tile, num_modules, first_module + slice_index, BLOCK_M)
    if num_rows == 0:
        return
    m_mask = _up_to(num_rows, BLOCK_M)
    y_ptrs = y_ptr + rows * y_stride + column + n[None, :]
    y = tl.load(y_ptrs, mask=m_mask & (n < out_size)[None, :], other=0.0)
    rank = tl.load(ranks_ptr + entry)
    scale_start = tl.load(row_scales_ptr + entry)
    a_ptr = arena_ptr + tl.multiple_of(tl.load(offsets_ptr + entry), _ALIGNMENT)
    b_ptr = _b(arena_ptr, offsets_ptr + entry, rank, in_size)
    if rank == 0:
        return
    x_ptrs = x_ptr + rows * x_stride
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if rank <= SMALL_RANK:
        h = _shrink(x_ptrs, a_ptr, m_mask, 0, rank, 0, in_size, part_size, BLOCK_M, SMALL_RANK, BLOCK_K)
        delta = _expand(delta, h, _load_b(b_ptr, n, 0, rank, out_size, SMALL_RANK), 0, rank, SMALL_RANK)
    else:
        for r_start in range(0, rank, BLOCK_R):
            h = _shrink(x_ptrs, a_ptr, m_mask, r_start, rank, 0, in_size, part_size, BLOCK_M, BLOCK_R, BLOCK_K)
            delta = _expand(delta, h, _load_b(b_ptr, n, r_start, rank, out_size, BLOCK_R), r_start, rank, BLOCK_R)
    _add(y_ptrs, y, delta, m_mask, n, out_size, arena_ptr, scale_start, bias_ptr + column, HAS_BIAS)


# ---- addresses ------------------------------------------------------------------------------------------------------


@triton.jit
def _rows_and_entry(tiles_ptr, tile, num_modules, module, BLOCK_M: tl.constexpr):
    """Return the tile's rows, `[BLOCK_M, 1]` int64, their number, and the index of its slot's module in the tables."""
    rows = tl.load(tiles_ptr + tile * 3).to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    num_rows = tl.load(tiles_ptr + tile * 3 + 1)
    slot = tl.load(tiles_ptr + tile * 3 + 2).to(tl.int64)
    return rows, num_rows, slot * num_modules + module


@triton.jit
def _up_to(num_rows, BLOCK_M: tl.constexpr):
    return tl.arange(0, BLOCK_M)[:, None] < num_rows


@triton.jit
def _columns(columns_ptr, block, OUT_MULTIPLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the slice of a block of columns, the columns within the slice, and the slice's width and start in y."""
    slice_index = tl.load(columns_ptr + block * 4)
    first = tl.load(columns_ptr + block * 4 + 1) * BLOCK_N
    out_size = tl.load(columns_ptr + block * 4 + 2) * OUT_MULTIPLE
    column = tl.load(columns_ptr + block * 4 + 3) * OUT_MULTIPLE
    return slice_index, first + tl.arange(0, BLOCK_N), out_size, column


@triton.jit
def _b(arena_ptr, offset_ptr, rank, in_size):
    """Return the address of B, as laid out by `pair.PairLayout`."""
    a_size = tl.cdiv(rank, _RANK_STEP) * _RANK_STEP * in_size
    return arena_ptr + tl.multiple_of(tl.load(offset_ptr), _ALIGNMENT) + tl.cdiv(a_size, _ALIGNMENT) * _ALIGNMENT


# ---- products -------------------------------------------------------------------------------------------------------


@triton.jit
def _shrink(
    x_ptrs,
    a_ptr,
    m_mask,
    r_start,
    rank,
    k_start,
    k_end,
    part_size,
    BLOCK_M: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return x @ A.T over features `[k_start, k_end)`, each part summed separately: `[BLOCK_M, RANKS]` float32."""
    a_stride = tl.cdiv(rank, _RANK_STEP) * _RANK_STEP
    r = r_start + tl.arange(0, RANKS)[None, :]
    h = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    for part_start in range(k_start, k_end, part_size):
        part_end = tl.minimum(part_start + part_size, k_end)
        acc = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
        for k_block in range(part_start, part_end, BLOCK_K):
            k = k_block + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptrs + k[None, :], mask=m_mask & (k < part_end)[None, :], other=0.0)
            a_mask = (k < part_end)[:, None] & (r < a_stride)
            a = tl.load(a_ptr + k[:, None] * a_stride + r, mask=a_mask, other=0.0)
            acc = tl.dot(x, a, acc, input_precision="ieee")
        h += acc
    return h


@triton.jit
def _load_b(b_ptr, n, r_start, rank, out_size, RANKS: tl.constexpr):
    """Return B.T of a block of ranks and columns: `[RANKS, BLOCK_N]`, 0 beyond the rank."""
    b_stride = tl.cdiv(out_size, _OUT_STEP) * _OUT_STEP
    r = r_start + tl.arange(0, RANKS)
    b_mask = (r < rank)[:, None] & (n < b_stride)[None, :]
    return tl.load(b_ptr + r[:, None] * b_stride + n[None, :], mask=b_mask, other=0.0)


@triton.jit
def _expand(delta, h, b, r_start, rank, RANKS: tl.constexpr):
    """Return delta + h @ B.T over a block of ranks. Values of h beyond the rank are masked."""
    r = r_start + tl.arange(0, RANKS)
    h = tl.where((r < rank)[None, :], h, 0.0)
    return tl.dot(h.to(b.dtype), b, delta, input_precision="ieee")


@triton.jit
def _store_h(h_ptrs, h, m_mask, r_start, rank, RANKS: tl.constexpr):
    r = r_start + tl.arange(0, RANKS)[None, :]
    tl.store(h_ptrs + r, h.to(h_ptrs.dtype.element_ty), mask=m_mask & (r < tl.cdiv(rank, _RANK_STEP) * _RANK_STEP))


@triton.jit
def _load_h(
    h_ptrs, plane_stride, m_mask, r_start, rank, PLANES: tl.constexpr, BLOCK_M: tl.constexpr, RANKS: tl.constexpr
):
    """Return the sum of the planes, in order: `[BLOCK_M, RANKS]` float32."""
    r = r_start + tl.arange(0, RANKS)[None, :]
    mask = m_mask & (r < tl.cdiv(rank, _RANK_STEP) * _RANK_STEP)
    h = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    for plane in tl.static_range(PLANES):  # pyright: ignore[reportGeneralTypeIssues]
        h += tl.load(h_ptrs + plane * plane_stride + r, mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def _add(y_ptrs, y, delta, m_mask, n, out_size, arena_ptr, scale_start, bias_ptr, HAS_BIAS: tl.constexpr):
    """Add delta to y and apply the row scale, in float32, rounding once."""
    n_mask = n < out_size
    mask = m_mask & n_mask[None, :]
    result = y.to(tl.float32) + delta
    if scale_start >= 0:
        scale = tl.load(arena_ptr + scale_start + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
            result = scale * (y.to(tl.float32) - bias + delta) + bias
        else:
            result = scale * result
    tl.store(y_ptrs, result.to(y.dtype), mask=mask)
