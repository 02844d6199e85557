# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# Triton turns launch arguments into constexpr and numbers into tensors; its annotations do not allow that.
"""The launch of `paged_attention` on a GPU: the cut of the work into programs. Kernels: `attention_kernels`."""

import torch
import triton
from torch import Tensor

from descant_kernels.attention_kernels import LOG2_E, attend_kernel, join_splits_kernel
from descant_kernels.batch import AttentionBatch

SPLIT = 256
"""Positions per split. Like the chunk size it determines the bits, so it must never depend on the batch.

One sequence of 512 positions takes 0.7 times as long with 256 as with 512; 32 sequences of 1,024 take 1.04 times."""
CHUNK_BYTES = 2**14
"""Size of a chunk's keys in shared memory, and again of its values."""
MIN_ROWS = 16
"""Rows of a tile where sequences have few queries (the smallest `tl.dot`)."""
MAX_ROWS = 128
"""Rows of a tile where sequences have many queries: a prompt of 2,048 takes 0.6 times as long as with 64."""
QUERY_BYTES = 2**15
"""Maximum bytes of a tile's queries. Together with two stages of chunks they fill the shared memory of an RTX."""
ENOUGH_PROGRAMS = 512
"""Number of programs from which splits are no longer spread: a few per multiprocessor of a large GPU."""
MAX_PARTIAL_FLOATS = 2**26
"""Maximum floats of weighted values in partial results; with more, splits are not spread."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """See `descant_kernels.paged_attention`. Rows of `q` beyond the last sequence are left undefined."""
    assert all(cache.is_contiguous() for cache in (k_cache, v_cache)), "caches are read through flat pointers"
    assert q.stride(2) == 1, "heads must be contiguous"
    num_tokens, heads, head_dim = q.shape
    num_sequences = batch.context_lens.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0 or num_sequences == 0:
        return out
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = _tile_rows(group, num_tokens, num_sequences, QUERY_BYTES // (block_d * q.element_size()))
    tile = block_m // group
    num_tiles = num_tokens // tile + num_sequences
    num_splits = triton.cdiv(_max_context_len(batch), SPLIT)
    spread = _is_spread(num_splits, num_tiles * kv_heads, out.numel())
    shape = (num_splits if spread else 0, num_tokens, heads)
    partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
    partial_m, partial_total = torch.empty((2, *shape), dtype=torch.float32, device=q.device)
    trees, max_depth = _tree_arguments(batch)
    meta = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "HAS_TREES": batch.ancestors is not None,
        "SPLIT": SPLIT,
        "BLOCK_D": block_d,
        "BLOCK_DEPTH": triton.next_power_of_2(max(1, max_depth)),
    }
    attend_kernel[(num_tiles, kv_heads, num_splits if spread else 1)](
        *(q, k_cache, v_cache, out, partial, partial_m, partial_total),
        *(batch.cu_seqlens_q, batch.context_lens, batch.block_tables, *trees),
        *(num_sequences, num_tokens, max_depth, scale * LOG2_E.value, soft_cap or 0.0),
        *(q.stride(0), q.stride(1), batch.block_tables.stride(0)),
        BLOCK_SIZE=block_size,
        HAS_CAP=soft_cap is not None,
        SPREAD=spread,
        CHUNK=_chunk_size(block_d, q.dtype),
        TILE=tile,
        BLOCK_M=block_m,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **meta,
        num_warps=8 if block_m >= 64 else 4,
        num_stages=2,
        enable_fp_fusion=True,
    )
    if spread:
        join_splits_kernel[(num_tokens, kv_heads)](
            *(out, partial, partial_m, partial_total, batch.cu_seqlens_q, batch.context_lens, *trees),
            *(num_sequences, num_tokens, max_depth),
            BLOCK_GROUP=triton.next_power_of_2(group),
            **meta,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _max_context_len(batch: AttentionBatch) -> int:
    """Return a bound on the contexts, from host data alone. It sizes the grid; surplus programs return at once."""
    return max(batch.host_context_lens)


def _tile_rows(group: int, num_tokens: int, num_sequences: int, room: int) -> int:
    """Return the rows of a tile: queries of one sequence times the query heads that share a key-value head."""
    few = triton.next_power_of_2(max(group, MIN_ROWS))
    return few if triton.cdiv(num_tokens, num_sequences) * group <= few else max(few, min(MAX_ROWS, room))


def _is_spread(num_splits: int, num_programs: int, num_floats: int) -> bool:
    """Return whether every split has a program of its own. The choice changes no bits."""
    return num_splits > 1 and num_programs < ENOUGH_PROGRAMS and num_splits * num_floats <= MAX_PARTIAL_FLOATS


def _chunk_size(block_d: int, dtype: torch.dtype) -> int:
    return max(16, min(64, CHUNK_BYTES // (block_d * dtype.itemsize)))


def _tree_arguments(batch: AttentionBatch) -> tuple[tuple[Tensor, Tensor], int]:
    """Return ancestors and prefixes, or placeholder tensors, and the depth of the deepest tree."""
    if batch.ancestors is None or batch.prefix_lens is None:
        return (batch.context_lens, batch.context_lens), 0
    return (batch.ancestors.contiguous(), batch.prefix_lens), batch.ancestors.shape[1]
