# pyright: reportArgumentType=false, reportCallIssue=false
# Triton turns launch arguments into constexpr and takes options such as num_warps; its annotations do not allow that.
"""The launches of `add_lora` on a GPU: one or two kernels, tile sizes and scratch memory.

*One launch or two.* One launch saves 2 to 3 µs. But every block of `BLOCK_N` columns then computes h again and so
reads A again: for rank 16 in 16 bits, 32 * in_size bytes per block and tile. These bytes come mostly from the L2 cache,
which delivers about 5 TB/s in total on an H100 or H200 (HBM: 3.3 and 4.8) and about 50 bytes/ns to one program. So
- in_size * blocks = `FUSED_WORK` = 8,192 rereads 256 KiB per tile, 0.05 µs. One launch is faster up to about 48 tiles,
  and about 11 µs slower at 256.
- in_size = `FUSED_IN_SIZE` = 1,024 makes one program read A for 0.7 µs, which two launches spread over programs.
With in_size 4,096, A alone takes one program 2.6 µs, the full cost of a launch, and 64 blocks reread 8 MiB per tile,
which is 1.7 µs more: no gain for one tile, and a large loss for many. So one launch is for small models, of hidden
sizes up to about 512. These figures are arithmetic. The choice depends on the model's sizes only, never on the batch or
on ranks. So it is the same for a row in any batch, in prefill and decode, in a CUDA graph or not.

*Tiles.* A tile of 16 rows loads A and B for 16 rows: at rank 64, four times the bytes of its x. So with two launches,
large batches with long segments are cut into tiles of 32 rows. Batches of up to `MAX_SPLIT_ROWS` rows have too few
tiles to fill a device, and larger ones may have too few as well. There each part of a long reduction gets a program of
its own, with its own plane of h, and expand adds the planes in order; otherwise one program adds all parts. Neither
changes the order of a row's sums (see `lora_tiles`). Tiles stay below 64 rows: from 64 rows on, a Hopper GPU uses
another tensor core instruction (wgmma) than for 16 (mma.sync), which may round differently.

*Measured.* The sizes below were chosen on an H100, in CUDA graphs over the groups of an 8B layer (rank 16, bfloat16),
as times of four groups. One row: 24 µs, of which 6 per group are the latency of two launches. 32 rows of 32 adapters:
90 µs (108.8 with 64 columns per program). 2,048 rows of one adapter: 256 µs (334 with tiles of 64 rows). All forms gave
the same bits there with tiles of 64 rows on two warps; tiles of 32 rows were compared in the interpreter only.

*Scratch memory.* h is `[planes, slices, rows, highest rank in the batch]`, float32 if there are planes to add, else of
the model's dtype. For q/k/v at rank 64 with 256 rows and 8 planes it takes 1.5 MiB, with 8,192 rows 3 MiB; with an
adapter of rank 1,024 in the batch, 24 and 48 MiB. While a CUDA graph is captured, `segments` and `tables` must hold
upper bounds for every replay.
"""

from functools import cache
from itertools import accumulate, pairwise
from math import gcd
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from descant_kernels import lora_tiles
from descant_kernels.batch import TILE_ROWS, LoraTables, Segments
from descant_kernels.pair import OUT_STEP, RANK_STEP

BLOCK_K_BYTES = 256
"""Bytes of each row of x in one step of a product: two cache lines (one line takes 1.5 µs more per layer)."""
FUSED_BLOCK_N = 64
"""Columns of a program of `fused_kernel`, which computes h itself."""
EXPAND_BYTES = 512
"""Bytes of each row of y in a program of `expand_kernel`: 256 columns of 16 bits. With 64 columns, 32 adapters take 1.2
times as long. With 512 they take 0.86 times as long, but B of high ranks no longer fits the shared memory of an RTX."""
WIDE_TILE_ROWS = 32
"""Rows of a tile in a large batch. With larger tiles, programs wait for each other's loads."""
PART_SIZE = 512
"""Minimum input features in one part of a long reduction."""
MAX_PARTS = 8
"""Maximum parts of one reduction. h has a plane for each."""
MAX_SPLIT_ROWS = 512
"""Maximum rows of a batch that is always cut into small tiles and has its reduction parts spread over programs."""
FEW_PROGRAMS = 100
"""Number of programs below which parts are spread in larger batches too: less than one per multiprocessor."""
MAX_RANK_PROGRAMS = 8
"""Maximum programs that share the blocks of a high rank. Adapters of low rank leave all but one of them idle."""
FUSED_WORK = 8192
"""Maximum input features times blocks of columns of a group that takes one launch."""
FUSED_IN_SIZE = 1024
"""Maximum input features of a group that takes one launch."""


def add_lora(
    y: Tensor,
    x: Tensor,
    tables: LoraTables,
    segments: Segments,
    first_module: int,
    out_sizes: tuple[int, ...],
    bias: Tensor | None = None,
) -> None:
    """See `descant_kernels.add_lora`. Features must be contiguous in x, y and bias; rows may have any stride."""
    assert x.stride(1) == y.stride(1) == 1, "features must be contiguous"
    assert bias is None or bias.is_contiguous(), "the bias must be contiguous"
    if segments.tiles.shape[0] == 0 or _max_rank(tables, segments) == 0:
        return
    call = _Call(y, x, tables, segments, first_module, out_sizes, bias)
    if is_fused(x.shape[1], out_sizes):
        _launch_once(call)
    else:
        _launch_twice(call)


class _Call(NamedTuple):
    """The arguments of `add_lora`, with the launch arguments that its kernels share."""

    y: Tensor
    x: Tensor
    tables: LoraTables
    segments: Segments
    first_module: int
    out_sizes: tuple[int, ...]
    bias: Tensor | None

    @property
    def num_modules(self) -> int:
        return self.tables.ranks.shape[1]

    @property
    def bias_pointer(self) -> Tensor:
        """The bias, or any tensor in its place: the kernel does not read it without `HAS_BIAS`."""
        return self.y if self.bias is None else self.bias

    def table_pointers(self, tiles: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        return tiles, columns, self.tables.offsets, self.tables.ranks, self.tables.row_scales

    def output_meta(self, block_m: int, block_n: int) -> dict[str, int]:
        return {
            "HAS_BIAS": self.bias is not None,
            "OUT_MULTIPLE": gcd(OUT_STEP, *self.out_sizes),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        }


def _launch_once(call: _Call) -> None:
    y, x, tiles = call.y, call.x, call.segments.tiles
    columns = _columns(call.out_sizes, y.device, FUSED_BLOCK_N)
    block_k, part_size = _steps(x)
    lora_tiles.fused_kernel[(len(tiles), len(columns))](
        *(y, x, call.tables.arena, call.bias_pointer, *call.table_pointers(tiles, columns)),
        *(x.shape[1], part_size, call.num_modules, call.first_module),
        *(y.stride(0), x.stride(0)),
        **call.output_meta(TILE_ROWS, FUSED_BLOCK_N),
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=4,
    )


def _launch_twice(call: _Call) -> None:
    y, x, tables = call.y, call.x, call.tables
    num_rows, in_size = x.shape
    num_slices, num_modules = len(call.out_sizes), call.num_modules
    wide = None if num_rows <= MAX_SPLIT_ROWS else wide_tiles(call.segments)
    tiles = call.segments.tiles if wide is None else wide
    block_m = TILE_ROWS if wide is None else WIDE_TILE_ROWS
    block_n = EXPAND_BYTES // y.element_size()
    columns = _columns(call.out_sizes, y.device, block_n)
    block_k, part_size = _steps(x)
    max_rank = _max_rank(tables, call.segments)
    rank_programs = min(triton.cdiv(max_rank, lora_tiles.BLOCK_R.value), MAX_RANK_PROGRAMS)
    is_spread = num_rows <= MAX_SPLIT_ROWS or len(tiles) * num_slices * rank_programs < FEW_PROGRAMS
    num_planes = triton.cdiv(in_size, part_size) if is_spread else 1
    h = torch.empty(
        *(num_planes, num_slices, num_rows, triton.cdiv(max_rank, RANK_STEP) * RANK_STEP),
        dtype=torch.float32 if num_planes > 1 else x.dtype,
        device=x.device,
    )
    lora_tiles.shrink_kernel[(len(tiles), num_slices * rank_programs, num_planes)](
        *(x, tables.arena, h, tiles, tables.offsets, tables.ranks),
        *(in_size, part_size, part_size if num_planes > 1 else in_size, num_slices, num_modules, call.first_module),
        *(x.stride(0), h.stride(0), h.stride(1), h.stride(2)),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    lora_tiles.expand_kernel[(len(tiles), len(columns))](
        *(y, tables.arena, h, call.bias_pointer, *call.table_pointers(tiles, columns)),
        *(in_size, num_modules, call.first_module),
        *(y.stride(0), h.stride(0), h.stride(1), h.stride(2)),
        **call.output_meta(block_m, block_n),
        NUM_PLANES=num_planes,
        num_warps=4,
        num_stages=2,  # each holds all planes
    )


def is_fused(in_size: int, out_sizes: tuple[int, ...]) -> bool:
    """Return whether a group of projections takes one launch."""
    num_blocks = sum(triton.cdiv(out_size, FUSED_BLOCK_N) for out_size in out_sizes)
    return in_size <= FUSED_IN_SIZE and in_size * num_blocks <= FUSED_WORK


def wide_tiles(segments: Segments) -> Tensor | None:
    """Return tiles as `Segments.tiles`, but of up to `WIDE_TILE_ROWS` rows; None if no segment has that many."""
    key = "wide tiles"
    if key not in segments.memo:
        runs = [(*run, slot) for run, slot in zip(pairwise(segments.host_indptr), segments.host_slots, strict=True)]
        tiles = [
            (row, min(WIDE_TILE_ROWS, end - row), slot)
            for start, end, slot in runs
            if slot >= 0
            for row in range(start, end, WIDE_TILE_ROWS)
        ]
        is_long = any(num_rows == WIDE_TILE_ROWS for _, num_rows, _ in tiles)
        segments.memo[key] = _on_device(tiles, segments.tiles.device) if is_long else None
    return segments.memo[key]


def _steps(x: Tensor) -> tuple[int, int]:
    """Return the input features in one step of a product, and in each part of a reduction but the last: whole steps."""
    block_k, in_size = BLOCK_K_BYTES // x.element_size(), x.shape[1]
    num_parts = max(1, min(MAX_PARTS, in_size // PART_SIZE))
    return block_k, triton.cdiv(triton.cdiv(in_size, num_parts), block_k) * block_k


def _max_rank(tables: LoraTables, segments: Segments) -> int:
    """Return the highest rank of any module of the batch's slots: the ranks that h has room for."""
    key = ("highest rank", tables)
    if key not in segments.memo:
        slots = {slot for slot in segments.host_slots if slot >= 0}
        segments.memo[key] = max((_max_rank_of(tables, slot) for slot in slots), default=0)
    return segments.memo[key]


def _max_rank_of(tables: LoraTables, slot: int) -> int:
    key = ("highest rank", slot)
    if key not in tables.memo:
        tables.memo[key] = max(tables.host_ranks[slot], default=0)
    return tables.memo[key]


@cache
def _columns(out_sizes: tuple[int, ...], device: torch.device, block_n: int) -> Tensor:
    """Return the blocks of columns of a group, `[num_blocks, 4]` int32.

    Per block: slice, number within the slice, and the slice's width and first column, both in units of the multiple.
    The tensor is cached for the life of the process, because CUDA graphs read it.
    """
    multiple, starts = gcd(OUT_STEP, *out_sizes), accumulate(out_sizes, initial=0)
    blocks = [
        (number, block, out_size // multiple, start // multiple)
        for number, (out_size, start) in enumerate(zip(out_sizes, starts, strict=False))
        for block in range(triton.cdiv(out_size, block_n))
    ]
    return _on_device(blocks, device)


def _on_device(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Return the integers as int32 on the device, without blocking the host."""
    values = torch.tensor(rows, dtype=torch.int32)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
