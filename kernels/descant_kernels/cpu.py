"""CPU paths of the dense ops and of the cache writes: every row bitwise independent of the rest of its batch.

What makes a row's bits depend on its neighbors on a CPU is a matrix product that picks another kernel for another
number of rows, and a vectorized function whose tail is computed by other code than its body. So products are padded
to row counts at which they are measured to agree (`probe` repeats the measurement), and `exp` is used where `silu`
and `sigmoid` differ in their tails.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.batch import PackedLinear
from descant_kernels.cpu_lora import add_lora

__all__ = ["add_lora", "linear", "move_kv", "pack_linear", "rms_norm", "rope", "silu_mul", "write_kv"]

PACKED_ROWS = 2
"""Fewest rows from which a packed oneDNN product gives a row the same bits at any row count."""

ROW_STEP = 16
"""Larger packed products are padded to multiples of this: oneDNN compiles and keeps code for each number of rows."""

PLAIN_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 1}
"""Multiple to which the rows of a plain product are padded."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a packed product for the dtype here: for bfloat16 only on CPUs that compute with it."""
    if not torch.backends.mkldnn.is_available():
        return False
    has_bfloat16 = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 — as below
    return dtype is torch.float32 or has_bfloat16


def pack_weight(weight: Tensor) -> Tensor:
    """The weight in oneDNN's own layout, opaque to everything but `packed_product`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001 — torch has no public name


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for a weight from `pack_weight`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: SLF001 — as above


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """See `descant_kernels.pack_linear`."""
    out_features, in_features = weight.shape
    if can_pack(weight.dtype):
        return PackedLinear(pack_weight(weight), bias, in_features, out_features, is_packed=True, min_rows=PACKED_ROWS)
    rows = PLAIN_ROWS[weight.dtype]
    return PackedLinear(weight, bias, in_features, out_features, is_packed=False, min_rows=rows)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `descant_kernels.linear`."""
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, packed.out_features)
    missing = _missing_rows(num_rows, packed)
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    product = packed_product if packed.is_packed else F.linear
    out = product(x, packed.weight, packed.bias)
    return out[:num_rows] if missing else out


def _missing_rows(num_rows: int, packed: PackedLinear) -> int:
    if not packed.is_packed:
        return -num_rows % packed.min_rows
    return -num_rows % ROW_STEP if num_rows > ROW_STEP else max(0, packed.min_rows - num_rows)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `descant_kernels.write_kv`."""
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


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `descant_kernels.rope`."""
    half = cos.shape[1]
    cos = cos[:, None, None]  # [T, 1, 1, d], the same for both halves
    sin = torch.stack((-sin, sin), dim=1)[:, None]  # [T, 1, 2, d], the sign of each half's other half
    for heads in (q, k):
        halves = heads[..., : 2 * half].unflatten(-1, (2, half))
        wide = halves.float()
        halves.copy_((wide * cos).add_(wide.flip(2).mul_(sin)))


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    activated = wide / wide.neg().exp_().add_(1.0)
    return activated.to(gate.dtype) * up
