"""An adapter as the rest of this package sees it: low-rank factors per module of the base model, and draft heads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from descant.versions.draft_heads import DraftHeads


def float32(value: float) -> float:
    """Return the float32 number nearest to `value`: infinite beyond their range, 0.0 for -0.0."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item() + 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's update: y += (x @ a.T) @ b.T * scaling.

    `scaling` is kept apart so that an adapter can be saved as it was; it is a float32 number, so that it survives
    being saved as `alpha = scaling * rank` and read again.
    """

    a: Tensor  # [R, in] float32
    b: Tensor  # [out, R] float32
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """R, the inner dimension."""
        return self.a.shape[0]

    def scaled_b(self) -> Tensor:
        """Return `b * scaling`, [out, R] float32: what kernels multiply with."""
        return self.b if self.scaling == 1.0 else self.b * self.scaling


@dataclass(frozen=True, slots=True, eq=False)
class LowRankAdapter:
    """Factors by module name, e.g. `model.layers.0.self_attn.q_proj`, and draft heads. Either may be missing.

    Modules not named are untouched.
    """

    factors: Mapping[str, Factors]
    heads: DraftHeads | None = None
