"""Copies and products beside the step loop, in pieces too small for torch to share among threads.

OpenMP gives every thread that shares work a team of helper threads for its lifetime. Once there are more helpers than
cores, waiting helpers sleep instead of spinning, those of the step loop included. Each of the hundreds of short
operations of a step then waits for a helper to wake up. That was measured to make steps 1.3 to 1.5 times as long, on
two cores, after a side thread had read one adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PIECE = 16_384  # elements; torch shares operations from twice this size on


def copy(target: Tensor, source: Tensor) -> None:
    """Copy a flat tensor into another, which may have another dtype.

    One call copies all pieces, because the step loop needs the interpreter.
    """
    torch._foreach_copy_(target.split(PIECE), source.split(PIECE))  # pyright: ignore[reportPrivateImportUsage]


def multiply(tensors: Sequence[Tensor], factors: Iterable[float]) -> None:
    """Multiply each flat tensor by its factor, in place and in one call, as in `copy`."""
    pieces: list[Tensor] = []
    of_pieces: list[float] = []
    for tensor, factor in zip(tensors, factors, strict=True):
        parts = tensor.split(PIECE)
        pieces += parts
        of_pieces += [factor] * len(parts)
    if pieces:
        torch._foreach_mul_(pieces, of_pieces)  # pyright: ignore[reportPrivateImportUsage]
