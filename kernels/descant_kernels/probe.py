"""Start-up self test: are a row's bits independent of the other rows on this machine?

Measures, for one dtype, the smallest row count (packed) or row multiple (plain, batched) at which products agree, and
whether the constants the CPU paths are built with suffice. Takes a fraction of a second.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from descant_kernels.cpu import PACKED_ROWS, PLAIN_ROWS, can_pack, pack_weight, packed_product
from descant_kernels.cpu_attention import BMM_ROWS, CHUNK

CANDIDATES = (1, 2, 4, 8, 16, 32)
NUM_ROWS = 192
SHAPES = ((896, 4864), (4864, 896), (64, 48), (37, 51), (128, 259), (1024, 1024))
"""(in, out): large, long, small, odd, ragged and square weights."""
HEAD_DIMS = (16, 64, 128)


@dataclass(frozen=True, slots=True)
class Invariance:
    """What was measured. None = no candidate agreed, or there is no such product for the dtype."""

    dtype: torch.dtype
    packed_rows: int | None  # fewest rows of a packed product
    plain_rows: int | None  # multiple of rows of a plain product
    bmm_rows: int | None  # multiple of rows of a float32 batched product, as in attention
    ok: bool  # whether the CPU paths' own minimums are at least these


def probe_invariance(dtype: torch.dtype, shapes: Iterable[tuple[int, int]] = ()) -> Invariance:
    """Measure on this machine with the current thread count.

    Args:
      dtype: of the model. shapes: further `(in, out)` weight shapes to try, those of the model at hand.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [_normal((out, in_), dtype, generator) for in_, out in dict.fromkeys((*SHAPES, *shapes))]
    packed_rows = _packed_rows(weights, generator) if can_pack(dtype) else None
    plain_rows = _plain_rows(weights, generator)
    bmm_rows = _bmm_rows(generator)
    used = _suffices(PACKED_ROWS, packed_rows) if can_pack(dtype) else _suffices(PLAIN_ROWS[dtype], plain_rows)
    return Invariance(dtype, packed_rows, plain_rows, bmm_rows, ok=used and _suffices(BMM_ROWS, bmm_rows))


def _suffices(used: int, measured: int | None) -> bool:
    return measured is not None and measured <= used


def _packed_rows(weights: list[Tensor], generator: torch.Generator) -> int | None:
    products: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for weight in weights:
        packed = pack_weight(weight)
        x = _normal((NUM_ROWS, weight.shape[1]), weight.dtype, generator)
        products.append((lambda x, w=packed: packed_product(x, w, None), x))
    return _smallest(products, lambda least: {least, least + 1, 2 * least + 1, 33, 64, 100, 129} - {*range(least)})


def _plain_rows(weights: list[Tensor], generator: torch.Generator) -> int | None:
    products: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for weight in weights:
        x = _normal((NUM_ROWS, weight.shape[1]), weight.dtype, generator)
        products.append((lambda x, w=weight: F.linear(x, w), x))
    return _smallest(products, _multiples)


def _bmm_rows(generator: torch.Generator) -> int | None:
    products: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    for head_dim in HEAD_DIMS:
        kv = _normal((3, CHUNK, head_dim), torch.float32, generator)
        q = _normal((NUM_ROWS, head_dim), torch.float32, generator)
        p = _normal((NUM_ROWS, CHUNK), torch.float32, generator)
        products.append((lambda x, kv=kv: torch.bmm(x.expand(3, -1, -1), kv.transpose(1, 2))[1], q))
        products.append((lambda x, kv=kv: torch.bmm(x.expand(3, -1, -1), kv)[1], p))
    return _smallest(products, _multiples)


def _multiples(step: int) -> set[int]:
    return {step, 2 * step, 3 * step, 5 * step} | {count // step * step for count in (64, 100, 129)}


def _smallest(
    products: list[tuple[Callable[[Tensor], Tensor], Tensor]], row_counts: Callable[[int], set[int]]
) -> int | None:
    """The smallest candidate with which every product gives rows the bits they have among all rows."""
    expected = [product(x) for product, x in products]
    for candidate in CANDIDATES:
        cases = [(first, count) for count in row_counts(candidate) for first in (0, 3)]
        if all(
            torch.equal(product(x[first : first + count].contiguous()), whole[first : first + count])
            for (product, x), whole in zip(products, expected, strict=True)
            for first, count in cases
        ):
            return candidate
    return None


def _normal(shape: tuple[int, int] | tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)
