"""Copies and products beside the step loop, in pieces that torch does not share among threads.

OpenMP gives every thread that shares its work a team of helpers, for as long as the thread lives. Once there are more
of them than cores, waiting helpers no longer spin but sleep, those of the step loop as well: each of its hundreds of
short operations then waits for one to wake up. That was measured to make steps 1.3 to 1.5 times as long, on two cores,
from the first adapter on that a side thread had read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PIECE = 16_384  # elements; torch shares from twice as many on


def copy(target: Tensor, source: Tensor) -> None:
    """Copy a flat tensor into another, which may have another dtype. One call: the step loop wants the interpreter."""
    torch._foreach_copy_(target.split(PIECE), source.split(PIECE))  # pyright: ignore[reportPrivateImportUsage]


def multiply(tensors: Sequence[Tensor], factors: Iterable[float]) -> None:
    """Multiply flat tensors by a number each, in place. One call, likewise."""
    pieces: list[Tensor] = []
    of_pieces: list[float] = []
    for tensor, factor in zip(tensors, factors, strict=True):
        parts = tensor.split(PIECE)
        pieces += parts
        of_pieces += [factor] * len(parts)
    if pieces:
        torch._foreach_mul_(pieces, of_pieces)  # pyright: ignore[reportPrivateImportUsage]
