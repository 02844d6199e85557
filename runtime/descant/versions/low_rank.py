"""An adapter in memory: low-rank factors per module of the base model, and draft heads."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from descant.versions.draft_heads import DraftHeads


def float32(value: float) -> float:
    """Return the float32 number nearest to `value`: infinite beyond the range of float32, and 0.0 for -0.0."""
    return torch.tensor(value, dtype=torch.float64).to(torch.float32).item() + 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The update of one module: y += (x @ a.T) @ b.T * scaling.

    `scaling` is separate so that an adapter can be saved unchanged. It is a float32 number, so that saving it as
    `alpha = scaling * rank` and reading it back is exact.
    """

    a: Tensor  # [R, in] float32
    b: Tensor  # [out, R] float32
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Inner dimension R."""
        return self.a.shape[0]

    def scaled_b(self) -> Tensor:
        """Return `b * scaling`, `[out, R]` float32: the B that kernels use."""
        return self.b if self.scaling == 1.0 else self.b * self.scaling


@dataclass(frozen=True, slots=True, eq=False)
class LowRankAdapter:
    """Factors by module name, such as `model.layers.0.self_attn.q_proj`, and draft heads. Either may be missing.

    Modules without factors are untouched.
    """

    factors: Mapping[str, Factors]
    heads: DraftHeads | None = None
