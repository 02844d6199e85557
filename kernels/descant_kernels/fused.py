# pyright: reportArgumentType=false
# Triton turns launch arguments into constexpr; its annotations do not say so.
"""Triton kernel of `rms_norm`: residual addition, norm and weight in one pass, one program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    # Pointers
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    # Sizes
    size,
    eps,
    # Strides
    x_outer_stride,
    x_inner_stride,
    # Meta
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i, j] = weight * normalized(x[i, j] + residual[i, j]), the sum stored to residual."""
    outer = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1)
    row = outer * tl.num_programs(1) + inner
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + outer * x_outer_stride + inner * x_inner_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        # The sum is rounded to the stream's dtype before it is normalized.
        residual = tl.load(residual_ptr + row * size + column, mask=mask, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * size + column, x, mask=mask)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / size + eps)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    normalized = (wide * scale).to(x.dtype)
    product = weight.to(tl.float32) * normalized.to(tl.float32)
    tl.store(out_ptr + row * size + column, product.to(x.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `descant_kernels.rms_norm`."""
    assert residual is None or residual.is_contiguous(), "the residual stream is written through a flat pointer"
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(0, -3)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    if rows.numel() == 0:
        return out
    _rms_norm_kernel[(rows.shape[0], rows.shape[1])](
        *(rows, rows if residual is None else residual, weight, out),
        *(size, eps),
        *(rows.stride(0), rows.stride(1)),
        HAS_RESIDUAL=residual is not None,
        BLOCK=triton.next_power_of_2(size),
    )
    return out
