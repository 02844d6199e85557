# pyright: reportArgumentType=false, reportCallIssue=false
# Triton turns launch arguments into constexpr and takes options such as num_warps; its annotations do not allow that.
"""Triton kernels of `rms_norm`, `silu_mul` and `gelu_mul`: each reads its input once and writes its result once.

The operations on a row depend on its width alone, never on the number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_TILE = 1024
"""Elements per program that normalizes short rows: it takes as many rows as fit."""
MAX_NORM_BLOCK = 16_384
"""Widest row that a program keeps in registers. Wider rows are read twice."""
ACTIVATION_BLOCK = 1024


@triton.jit
def _add_rounded(x, residual):
    """Return the sum in the residual stream's dtype: it is rounded before normalization."""
    return (residual.to(tl.float32) + x.to(tl.float32)).to(residual.dtype)


@triton.jit
def _times_weight(x, scale, weight):
    """Return weight * (x * scale).to(dtype), each of the two products rounded, as the contract demands."""
    normalized = (x.to(tl.float32) * scale).to(x.dtype)
    return (weight.to(tl.float32) * normalized.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])  # else the number of rows would select a compiled variant
def _rms_norm_kernel(
    # Pointers
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    # Sizes
    num_rows,
    inner_rows,
    size,
    eps,
    # Strides
    x_outer_stride,
    x_inner_stride,
    # Meta
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store out[row] = weight * normalized(x[row] + residual[row]), and the sum to residual. ROWS rows per program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < size)
    x_offset = (row // inner_rows).to(tl.int64) * x_outer_stride + (row % inner_rows) * x_inner_stride + column
    offset = row.to(tl.int64) * size + column
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        x = _add_rounded(x, tl.load(residual_ptr + offset, mask=mask, other=0.0))
        tl.store(residual_ptr + offset, x, mask=mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0)
    tl.store(out_ptr + offset, _times_weight(x, scale[:, None], weight), mask=mask)


@triton.jit
def _wide_rms_norm_kernel(
    # Pointers
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    # Sizes
    inner_rows,
    size,
    eps,
    # Strides
    x_outer_stride,
    x_inner_stride,
    # Meta
    HAS_RESIDUAL: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute as `_rms_norm_kernel`, one row per program, in blocks: first the sum of squares, then the products."""
    row = tl.program_id(0).to(tl.int64)
    x_row_ptr = x_ptr + (row // inner_rows) * x_outer_stride + (row % inner_rows) * x_inner_stride
    residual_row_ptr = residual_ptr + row * size
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_row_ptr + column, mask=column < size, other=0.0)
        if HAS_RESIDUAL:
            x = _add_rounded(x, tl.load(residual_row_ptr + column, mask=column < size, other=0.0))
            tl.store(residual_row_ptr + column, x, mask=column < size)
        wide = x.to(tl.float32)
        squares += wide * wide
    scale = tl.rsqrt(tl.sum(squares, axis=0) / size + eps)
    if HAS_RESIDUAL:
        x_row_ptr = residual_row_ptr
        tl.debug_barrier()  # a thread may read values that another thread of this program stored
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_row_ptr + column, mask=column < size, other=0.0)
        weight = tl.load(weight_ptr + column, mask=column < size, other=0.0)
        tl.store(out_ptr + row * size + column, _times_weight(x, scale, weight), mask=column < size)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """See `descant_kernels.rms_norm`."""
    assert residual is None or residual.is_contiguous(), "the residual stream is written through a flat pointer"
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = _three_axes(x)
    num_rows, inner_rows = rows.shape[0] * rows.shape[1], rows.shape[1]
    pointers = (rows, rows if residual is None else residual, weight, out)
    strides = (rows.stride(0), rows.stride(1))
    block = min(triton.next_power_of_2(size), MAX_NORM_BLOCK)
    if size > block:
        _wide_rms_norm_kernel[(num_rows,)](
            *(*pointers, inner_rows, size, eps, *strides),
            HAS_RESIDUAL=residual is not None,
            NUM_BLOCKS=triton.cdiv(size, block),
            BLOCK=block,
            num_warps=16,
        )
        return out
    rows_per_program = max(1, NORM_TILE // block)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        *(*pointers, num_rows, inner_rows, size, eps, *strides),
        HAS_RESIDUAL=residual is not None,
        ROWS=rows_per_program,
        BLOCK=block,
        num_warps=max(4, min(16, block // 512)),
    )
    return out


def _three_axes(x: Tensor) -> Tensor:
    """Return x as `[outer, inner, size]` with contiguous rows: a view where possible, as of heads in a packed qkv."""
    x = x if x.dim() > 1 else x[None]
    x = x.unsqueeze(1) if x.dim() == 2 else x.flatten(0, -3)
    return x if x.stride(2) == 1 else x.contiguous()


@triton.jit
def _gated_product_kernel(
    # Pointers
    gate_up_ptr,
    out_ptr,
    # Sizes
    size,
    # Strides
    gate_up_stride,
    # Meta
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store out[row] = activation(gate_up[row, :size]) * gate_up[row, size:], one block of columns per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up_ptr + row * gate_up_stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * gate_up_stride + size + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    # Both are x * sigmoid(z): silu with z = x, gelu because (1 + tanh(z / 2)) / 2 = sigmoid(z).
    z = wide
    if IS_GELU:
        z = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)  # 2 * sqrt(2 / pi)
    activated = (wide / (1.0 + tl.exp(-z))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + column, product.to(gate.dtype), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.silu_mul`."""
    return _gated_product(gate_up, is_gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See `descant_kernels.gelu_mul`."""
    return _gated_product(gate_up, is_gelu=True)


def _gated_product(gate_up: Tensor, is_gelu: bool) -> Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(triton.next_power_of_2(size), ACTIVATION_BLOCK)
        _gated_product_kernel[(num_rows, triton.cdiv(size, block))](
            *(gate_up, out, size, gate_up.stride(0)), IS_GELU=is_gelu, BLOCK=block
        )
    return out
