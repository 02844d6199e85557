"""The layout of one module's A and B in the arena, the same in every dtype and on every device.

Both are stored transposed: A as `[in, R]`, B as `[R, out]`. The ranks of one input feature, and the outputs of one
rank, are then runs of memory: CPU paths sum such runs in place, and Triton loads them coalesced. Rows are padded to
`RANK_STEP` and `OUT_STEP` elements, so that a run can be read in whole vectors. The content of the padding is ignored.
"""

from dataclasses import dataclass

from torch import Tensor

ALIGNMENT = 64
"""Alignment of A and B in elements. The arena itself is aligned to at least as many bytes."""

RANK_STEP = 8
OUT_STEP = 16


@dataclass(frozen=True, slots=True)
class PairLayout:
    """Strides and offsets in elements, relative to the start of the pair."""

    rank: int
    in_size: int
    out_size: int
    a_stride: int  # of A's rows, one per input feature
    b_start: int
    b_stride: int  # of B's rows, one per rank
    size: int  # of the whole pair, a multiple of ALIGNMENT

    @classmethod
    def of(cls, rank: int, in_size: int, out_size: int) -> "PairLayout":
        """Return the layout of a pair of true rank `rank`; rank 0 has size 0."""
        a_stride = padded(rank, RANK_STEP)
        b_stride = padded(out_size, OUT_STEP)
        b_start = padded(in_size * a_stride, ALIGNMENT)
        size = padded(b_start + rank * b_stride, ALIGNMENT) if rank else 0
        return cls(rank, in_size, out_size, a_stride, b_start, b_stride, size)

    def views(self, flat: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Return A `[R, in]` and B `[out, R]` of the pair at element `offset` of a flat tensor, as views of it."""
        a = flat[offset : offset + self.in_size * self.a_stride].view(self.in_size, self.a_stride)
        b_offset = offset + self.b_start
        b = flat[b_offset : b_offset + self.rank * self.b_stride].view(self.rank, self.b_stride)
        return a[:, : self.rank].T, b[:, : self.out_size].T


def padded(size: int, step: int) -> int:
    """Return the least multiple of `step` that is no less than `size`."""
    return -(-size // step) * step
