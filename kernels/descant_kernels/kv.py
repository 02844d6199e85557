# pyright: reportArgumentType=false
# Triton turns launch arguments into constexpr; its annotations do not say so.
"""Triton kernel of `write_kv`: one program stores one token's keys and values of all heads."""

import triton
import triton.language as tl
from torch import Tensor

from descant_kernels.reference import move_kv

__all__ = ["move_kv", "write_kv"]


@triton.jit
def _write_kv_kernel(
    # Pointers
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    # Strides
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    # Meta
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """cache[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = row, for slot >= 0."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        element = tl.arange(0, BLOCK)
        head = element // HEAD_DIM
        dim = element % HEAD_DIM
        mask = element < KV_HEADS * HEAD_DIM
        k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + dim, mask=mask)
        v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + dim, mask=mask)
        line = ((slot // BLOCK_SIZE) * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(k_cache_ptr + line * HEAD_DIM + dim, k, mask=mask)
        tl.store(v_cache_ptr + line * HEAD_DIM + dim, v, mask=mask)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `descant_kernels.write_kv`."""
    assert all(cache.is_contiguous() for cache in (k_cache, v_cache)), "caches are written through flat pointers"
    assert k.stride(2) == v.stride(2) == 1, "heads must be contiguous"
    num_tokens, kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    _write_kv_kernel[(num_tokens,)](
        *(k, v, k_cache, v_cache, slot_mapping),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        KV_HEADS=kv_heads,
        BLOCK_SIZE=k_cache.shape[2],
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(kv_heads * head_dim),
    )
