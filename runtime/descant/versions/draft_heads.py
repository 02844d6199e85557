"""Draft heads (Medusa): small networks on the base's last hidden state that draft tokens further ahead.

Drafts are verified before they are emitted, so heads never change a token. This module defines heads and their layout
in a flat tensor; the engine computes with them.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from descant_kernels.pair import ALIGNMENT, padded

_Count = Annotated[int, msgspec.Meta(ge=1)]


class HeadsShape(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The sizes of a version's heads that do not follow from the shape of the base."""

    num_heads: _Count
    num_layers: _Count  # residual blocks of each head
    has_lm_heads: bool


@dataclass(frozen=True, slots=True, eq=False)
class DraftHeads:
    """The n heads of a version, each with L residual blocks: x += silu(weight @ x + bias), L times.

    The input is the base's last hidden state. The logits come from the head's own LM head (Medusa v1) or from that of
    the base (v2). Head 0 drafts the token after the one that the base predicts, head 1 the next one, and so on. In
    adapters the tensors are float32 on the CPU, in the arena they are views in its dtype.
    """

    weight: Tensor  # [n, L, H, H], out before in
    bias: Tensor  # [n, L, H]
    lm_heads: Tensor | None  # [n, V, H]; None: the base's

    @property
    def shape(self) -> HeadsShape:
        """The shape: n, L, and whether there are LM heads."""
        num_heads, num_layers, _ = self.bias.shape
        return HeadsShape(num_heads, num_layers, self.lm_heads is not None)

    def tensors(self) -> list[Tensor]:
        """Return the existing tensors in the order of a flat tensor."""
        return [self.weight, self.bias, *([] if self.lm_heads is None else [self.lm_heads])]


@dataclass(frozen=True, slots=True)
class HeadsLayout:
    """The layout of heads in a flat tensor: one tensor after the other, each at a multiple of `ALIGNMENT`."""

    shape: HeadsShape
    hidden_size: int
    vocab_size: int

    @property
    def size(self) -> int:
        """Number of elements of all tensors, a multiple of `ALIGNMENT`."""
        return sum(padded(math.prod(dims), ALIGNMENT) for dims in self._dims())

    def views(self, flat: Tensor, offset: int) -> DraftHeads:
        """Return the heads at element `offset` of a flat tensor, as views of it."""
        tensors: list[Tensor] = []
        for dims in self._dims():
            num_elements = math.prod(dims)
            tensors.append(flat[offset : offset + num_elements].view(dims))
            offset += padded(num_elements, ALIGNMENT)
        return DraftHeads(tensors[0], tensors[1], tensors[2] if self.shape.has_lm_heads else None)

    def empty(self) -> DraftHeads:
        """Return heads with uninitialized memory."""
        return self.views(torch.empty(self.size), 0)

    def _dims(self) -> list[tuple[int, ...]]:
        heads, blocks, hidden = self.shape.num_heads, self.shape.num_layers, self.hidden_size
        lm_heads = [(heads, self.vocab_size, hidden)] if self.shape.has_lm_heads else []
        return [(heads, blocks, hidden, hidden), (heads, blocks, hidden), *lm_heads]
