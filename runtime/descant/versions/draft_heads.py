"""Draft heads (Medusa): small networks on the base's last hidden state that guess tokens further ahead.

What they guess is verified before anybody sees it, so they never change a token. This file says what they are and how
they lie in a flat tensor; computing with them is the engine's.
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
    """All that the base's own shape does not say of a version's heads."""

    num_heads: _Count
    num_layers: _Count  # residual blocks of each head
    has_lm_heads: bool


@dataclass(frozen=True, slots=True, eq=False)
class DraftHeads:
    """n heads of L residual blocks: x += silu(weight @ x + bias), L times, from the base's last hidden state on.

    The logits are those of the head's own LM head (Medusa v1), or of the base's (v2). Head 0 guesses the token after
    the one that the base itself predicts, head 1 the next one, and so on. Adapters have them in float32 on the CPU, the
    arena as views in its dtype.
    """

    weight: Tensor  # [n, L, H, H], out before in
    bias: Tensor  # [n, L, H]
    lm_heads: Tensor | None  # [n, V, H]; None: the base's

    @property
    def shape(self) -> HeadsShape:
        """n, L, and whether there are LM heads."""
        num_heads, num_layers, _ = self.bias.shape
        return HeadsShape(num_heads, num_layers, self.lm_heads is not None)

    def tensors(self) -> list[Tensor]:
        """Return the tensors there are, in the order of a flat tensor."""
        return [self.weight, self.bias, *([] if self.lm_heads is None else [self.lm_heads])]


@dataclass(frozen=True, slots=True)
class HeadsLayout:
    """Where the tensors of heads lie in a flat tensor: one after the other, each beginning where a pair may."""

    shape: HeadsShape
    hidden_size: int
    vocab_size: int

    @property
    def size(self) -> int:
        """Of all tensors, in elements, a multiple of ALIGNMENT."""
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
        """Return heads that are yet to be filled."""
        return self.views(torch.empty(self.size), 0)

    def _dims(self) -> list[tuple[int, ...]]:
        heads, blocks, hidden = self.shape.num_heads, self.shape.num_layers, self.hidden_size
        lm_heads = [(heads, self.vocab_size, hidden)] if self.shape.has_lm_heads else []
        return [(heads, blocks, hidden, hidden), (heads, blocks, hidden), *lm_heads]
