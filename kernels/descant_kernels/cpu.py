"""CPU paths of norm, rotation, activation and cache writes: every row bitwise independent of the rest of its batch.

Vectorized `silu`, `sigmoid` and `tanh` compute the tail of a tensor by other code than its body, so their bits depend
on the place in the tensor. They are therefore built from `exp`, which gives the same bits everywhere.
"""

import math

import torch
from torch import Tensor


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `descant_kernels.rope_write_kv`."""
    _rope((q, k), cos, sin)
    kept = slot_mapping >= 0
    if not kept.all():
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    blocks, offsets = _split(slot_mapping, k_cache.shape[2])
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def move_kv(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """See `descant_kernels.move_kv`."""
    sources = _split(src_slots, k_cache.shape[2])
    targets = _split(dst_slots, k_cache.shape[2])
    for cache in (k_cache, v_cache):
        cache[targets[0], :, targets[1]] = cache[sources[0], :, sources[1]]


def _split(slots: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = slots // block_size
    return blocks, slots - blocks * block_size


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `descant_kernels.rms_norm`."""
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return weight * (wide * scale).to(x.dtype)


def _rope(heads_of_both: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[1]
    cos = cos[:, None, None]  # [T, 1, 1, d], the same for both halves
    sin = torch.stack((-sin, sin), dim=1)[:, None]  # [T, 1, 2, d], the sign of each half's other half
    for heads in heads_of_both:
        halves = heads[..., : 2 * half].unflatten(-1, (2, half))
        wide = halves.float()
        halves.copy_((wide * cos).add_(wide.flip(2).mul_(sin)))


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    activated = wide / wide.neg().exp_().add_(1.0)
    return activated.to(gate.dtype) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.gelu_mul`: x * (1 + tanh(u)) / 2 is x * sigmoid(2u)."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    doubled = wide.square().mul_(0.044715).add_(1.0).mul_(wide).mul_(2.0 * math.sqrt(2.0 / math.pi))
    activated = wide / doubled.neg_().exp_().add_(1.0)
    return activated.to(gate.dtype) * up
