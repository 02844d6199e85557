# pyright: reportArgumentType=false, reportCallIssue=false
# Triton turns launch arguments into constexpr and takes options such as num_warps; its annotations do not allow that.
"""Triton kernels of `rope_write_kv` and `move_kv`.

`rope_write_kv` is one launch: a program rotates a few query heads of one token in place, or rotates and stores a few
of its key heads and stores their values. `move_kv` is two launches: all positions are read before any is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAM_SIZE = 1024
"""Components of the heads that one program rotates, and maximum elements of a position that one program moves."""


@triton.jit
def _rotate(x_ptr, cos, sin, offset, mask, HALF: tl.constexpr):
    """Return the two rotated halves, rounded once. Each product is rounded in float32, as in the reference."""
    x1 = tl.load(x_ptr + offset, mask=mask)
    x2 = tl.load(x_ptr + offset + HALF, mask=mask)
    wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
    return (wide1 * cos - wide2 * sin).to(x1.dtype), (wide2 * cos + wide1 * sin).to(x1.dtype)


@triton.jit
def _rope_write_kv_kernel(
    # Pointers
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    # Strides
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    # Meta
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Rotate and store. Grid: (tokens, KV_PROGRAMS + query programs), each for HEADS heads, key-value heads first."""
    KV_PROGRAMS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots_ptr + token)
    if (part < KV_PROGRAMS) & (slot < 0):
        return
    half = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + token * HALF + half, mask=half < HALF)
    sin = tl.load(sin_ptr + token * HALF + half, mask=half < HALF)
    if part < KV_PROGRAMS:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        line = (((slot // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
        k_offset = token * k_token_stride + head * k_head_stride
        mask = (head < KV_HEADS) & (half < HALF)
        k1, k2 = _rotate(k_ptr, cos, sin, k_offset + half, mask, HALF)
        tl.store(k_cache_ptr + line + half, k1, mask=mask)
        tl.store(k_cache_ptr + line + half + HALF, k2, mask=mask)
        dim = tl.arange(0, BLOCK_DIM)[None, :]
        whole = (head < KV_HEADS) & (dim < HEAD_DIM)
        if 2 * HALF < HEAD_DIM:
            kept = whole & (dim >= 2 * HALF)
            tl.store(k_cache_ptr + line + dim, tl.load(k_ptr + k_offset + dim, mask=kept), mask=kept)
        v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + dim, mask=whole)
        tl.store(v_cache_ptr + line + dim, v, mask=whole)
    else:
        head = (part - KV_PROGRAMS) * HEADS + tl.arange(0, HEADS)[:, None]
        offset = token * q_token_stride + head * q_head_stride + half
        mask = (head < Q_HEADS) & (half < HALF)
        q1, q2 = _rotate(q_ptr, cos, sin, offset, mask, HALF)
        tl.store(q_ptr + offset, q1, mask=mask)
        tl.store(q_ptr + offset + HALF, q2, mask=mask)


@triton.jit
def _copy_positions_kernel(
    # Pointers
    k_cache_ptr,
    v_cache_ptr,
    moved_ptr,
    slots_ptr,
    # Meta
    TO_CACHE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy between moved[m, 0 keys | 1 values, head] and the cache at slots[m]. Grid: (m, blocks of elements)."""
    m = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + m)
    if slot < 0:
        return
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head = element // HEAD_DIM
    mask = element < KV_HEADS * HEAD_DIM
    line = ((slot // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    cached = line * HEAD_DIM + element % HEAD_DIM
    keys_ptr = moved_ptr + 2 * m * (KV_HEADS * HEAD_DIM) + element
    values_ptr = keys_ptr + KV_HEADS * HEAD_DIM
    if TO_CACHE:
        tl.store(k_cache_ptr + cached, tl.load(keys_ptr, mask=mask), mask=mask)
        tl.store(v_cache_ptr + cached, tl.load(values_ptr, mask=mask), mask=mask)
    else:
        tl.store(keys_ptr, tl.load(k_cache_ptr + cached, mask=mask), mask=mask)
        tl.store(values_ptr, tl.load(v_cache_ptr + cached, mask=mask), mask=mask)


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `descant_kernels.rope_write_kv`; `k` is not changed."""
    assert all(t.is_contiguous() for t in (k_cache, v_cache, cos, sin)), "these are used through flat pointers"
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "heads must be contiguous"
    num_tokens, q_heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1]
    if num_tokens == 0:
        return
    block_dim = triton.next_power_of_2(head_dim)
    heads = max(1, PROGRAM_SIZE // block_dim)
    _rope_write_kv_kernel[(num_tokens, triton.cdiv(kv_heads, heads) + triton.cdiv(q_heads, heads))](
        *(q, k, v, cos, sin, k_cache, v_cache, slot_mapping),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_SIZE=k_cache.shape[2],
        HEADS=heads,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_DIM=block_dim,
        enable_fp_fusion=False,
    )


def move_kv(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """See `descant_kernels.move_kv`. A move to -1 is skipped, so moves may be padded."""
    assert all(cache.is_contiguous() for cache in (k_cache, v_cache)), "caches are used through flat pointers"
    num_moves, (_, kv_heads, block_size, head_dim) = src_slots.shape[0], k_cache.shape
    if num_moves == 0:
        return
    moved = torch.empty((num_moves, 2, kv_heads, head_dim), dtype=k_cache.dtype, device=k_cache.device)
    block = min(PROGRAM_SIZE, triton.next_power_of_2(kv_heads * head_dim))
    for slots, to_cache in ((src_slots, False), (dst_slots, True)):
        _copy_positions_kernel[(num_moves, triton.cdiv(kv_heads * head_dim, block))](
            *(k_cache, v_cache, moved, slots),
            TO_CACHE=to_cache,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=block_size,
            BLOCK=block,
            enable_fp_fusion=False,
        )
