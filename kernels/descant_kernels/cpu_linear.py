"""CPU path of `linear`: the fastest product this CPU has for the dtype, with every row bitwise independent of the rest.

A row's bits depend on its neighbors if the product uses another kernel for another number of rows. So rows are padded
to counts at which the kernels were measured to agree; `probe` repeats the measurement at start.

- oneDNN with its own weight layout: float32 everywhere, bfloat16 on CPUs that compute in it.
- FBGEMM with float16 weights and float32 rows: float16 on all CPUs, bfloat16 on the other ones. It reads two bytes per
  weight and computes in float32; a plain product in these dtypes is an order of magnitude slower.
- The plain product where neither exists, where no row step makes FBGEMM row-invariant, or where a bfloat16 weight would
  lose precision as float16.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.batch import PackedLinear

ONEDNN_MIN_ROWS = 2
"""Minimum rows from which a packed oneDNN product gives a row the same bits at any row count."""

ONEDNN_ROW_STEP = 16
"""Multiple to which larger packed products are padded: oneDNN compiles and keeps code for each number of rows."""

FBGEMM_ROW_STEPS = (1, 2, 3, 4, 6, 8, 12, 14, 16)
"""Row multiples to try: FBGEMM cuts rows into runs of up to 6 (AVX2) or 14 (AVX-512), each a kernel of its own."""

PLAIN_ROW_STEP = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 1}
"""Multiple to which the rows of a plain product are padded."""

_PROBED_ROWS = 252  # more than the 120 rows that FBGEMM takes at a time
_PROBED_SHAPES = ((48, 64), (259, 900))  # whole and ragged blocks of columns, one and several blocks of features

_HALF_MAX = 65504.0
_HALF_LEAST_LARGEST = 2.0**-9
"""Least magnitude of the largest weight for which float16 is precise enough. Weights below the range of float16 are off
by at most 2**-25, which is 2**-16 of a largest weight of this size."""


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """See `descant_kernels.pack_linear`."""
    out_features, in_features = weight.shape
    product, padded_rows = _onednn(weight, bias) or _fbgemm(weight, bias) or _plain(weight, bias)
    return PackedLinear(product, padded_rows, weight.dtype, in_features, out_features)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `descant_kernels.linear`."""
    num_rows = x.shape[0]
    if num_rows == 0:
        return x.new_empty(0, packed.out_features)
    missing = packed.padded_rows(num_rows) - num_rows
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    out = packed.product(x)
    return out[:num_rows] if missing else out


Product = tuple[Callable[[Tensor], Tensor], Callable[[int], int]]
"""The product, and the function from a row count to the row count that its argument must be padded to."""


def _onednn(weight: Tensor, bias: Tensor | None) -> Product | None:
    if not _has_onednn(weight.dtype):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001 — torch has no public name
    linear_pointwise = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 — as above
    return lambda x: linear_pointwise(x, packed, bias, "none", [], ""), _onednn_rows


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    has_bfloat16 = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 — as above
    return dtype is torch.float32 or has_bfloat16


def _onednn_rows(num_rows: int) -> int:
    return _multiple(ONEDNN_ROW_STEP, num_rows) if num_rows > ONEDNN_ROW_STEP else max(ONEDNN_MIN_ROWS, num_rows)


def _fbgemm(weight: Tensor, bias: Tensor | None) -> Product | None:
    if weight.dtype is torch.float32 or not _survives_as_half(weight):
        return None
    step = fbgemm_row_step(torch.get_num_threads())
    if step is None:
        return None
    dtype, multiply = weight.dtype, _fbgemm_product(weight, bias)
    return lambda x: multiply(x.float()).to(dtype), functools.partial(_multiple, step)


def _survives_as_half(weight: Tensor) -> bool:
    """Return whether float16 can hold the weights: the range of bfloat16 is larger at both ends."""
    if weight.dtype is torch.float16 or weight.numel() == 0:
        return True
    largest = max(-weight.amin().item(), weight.amax().item())
    return largest == 0.0 or _HALF_LEAST_LARGEST <= largest <= _HALF_MAX


def _fbgemm_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the product of float32 rows with float16 weights, with float32 sums."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


@functools.cache
def fbgemm_row_step(num_threads: int) -> int | None:
    """Return the smallest row multiple at which FBGEMM's float16 product is row-invariant; None = none or no FBGEMM."""
    generator = torch.Generator().manual_seed(num_threads)
    try:
        products = [
            (_fbgemm_product(torch.randn(shape, generator=generator), None), torch.randn(_PROBED_ROWS, shape[1]))
            for shape in _PROBED_SHAPES
        ]
        return next((step for step in FBGEMM_ROW_STEPS if all(_agrees(*one, step) for one in products)), None)
    except RuntimeError:  # this build or CPU has no FBGEMM
        return None


def _agrees(product: Callable[[Tensor], Tensor], x: Tensor, step: int) -> bool:
    """Return whether the first rows get the same bits at every multiple of `step`."""
    whole = product(x[: _multiple(step, _PROBED_ROWS - step + 1)])
    return all(torch.equal(product(x[:count]), whole[:count]) for count in range(step, whole.shape[0], step))


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    step = PLAIN_ROW_STEP[weight.dtype]
    return lambda x: F.linear(x, weight, bias), functools.partial(_multiple, step)


def _multiple(step: int, num_rows: int) -> int:
    return -(-num_rows // step) * step
