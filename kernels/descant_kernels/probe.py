"""Self test at start: whether a row's bits are independent of the other rows on this machine.

It runs the products of the CPU paths on single rows, few rows and many rows, and takes a fraction of a second.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from descant_kernels.cpu_attention import BMM_ROWS, CHUNK
from descant_kernels.cpu_linear import linear, pack_linear

NUM_ROWS = 136
SHAPES = ((896, 4864), (4864, 896), (64, 48), (37, 51), (128, 259), (1024, 1024))
"""Weight shapes (in, out): large, long, small, odd, ragged and square."""
COUNTS = (1, 2, 3, 4, 7, 17, 33, 100)
HEAD_DIMS = (16, 64, 128)


@dataclass(frozen=True, slots=True)
class Invariance:
    """The result of the probe: whether a row always gets the same bits."""

    dtype: torch.dtype
    linear: bool  # for `linear`
    attention: bool  # for the batched products of attention

    @property
    def ok(self) -> bool:
        """Whether both are row-invariant."""
        return self.linear and self.attention


def probe_invariance(dtype: torch.dtype, shapes: Iterable[tuple[int, int]] = ()) -> Invariance:
    """Run the probe on this machine with the current thread count.

    Args:
      dtype: of the model. shapes: further `(in, out)` weight shapes to try, such as those of the served model.
    """
    generator = torch.Generator().manual_seed(0)
    is_linear = all(_linear_agrees(shape, dtype, generator) for shape in dict.fromkeys((*SHAPES, *shapes)))
    is_attention = all(_attention_agrees(head_dim, generator) for head_dim in HEAD_DIMS)
    return Invariance(dtype, is_linear, is_attention)


def _linear_agrees(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> bool:
    in_size, out_size = shape
    layer = pack_linear(torch.randn(out_size, in_size, generator=generator).to(dtype))
    x = torch.randn(NUM_ROWS, in_size, generator=generator).to(dtype)
    return _agrees(lambda rows: linear(rows, layer), x, COUNTS)


def _attention_agrees(head_dim: int, generator: torch.Generator) -> bool:
    kv = torch.randn(3, CHUNK, head_dim, generator=generator)
    q = torch.randn(NUM_ROWS, head_dim, generator=generator)
    p = torch.randn(NUM_ROWS, CHUNK, generator=generator)
    counts = [BMM_ROWS * n for n in (1, 2, 3, 5, 8, 12, 16)]
    return _agrees(lambda x: torch.bmm(x.expand(3, -1, -1), kv.transpose(1, 2))[1], q, counts) and _agrees(
        lambda x: torch.bmm(x.expand(3, -1, -1), kv)[1], p, counts
    )


def _agrees(product: Callable[[Tensor], Tensor], x: Tensor, counts: Iterable[int]) -> bool:
    whole = product(x)
    return all(
        torch.equal(product(x[first : first + count].contiguous()), whole[first : first + count])
        for first in (0, 3)
        for count in counts
    )
