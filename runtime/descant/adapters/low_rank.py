"""An adapter as the rest of this package sees it: low-rank factors per module of the base model."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One module's update: y += (x @ a.T) @ b.T, scaling folded into `b`."""

    a: Tensor  # [R, in] float32
    b: Tensor  # [out, R] float32

    @property
    def rank(self) -> int:
        """R, the inner dimension."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LowRankAdapter:
    """Factors by module name, e.g. `model.layers.0.self_attn.q_proj`. Modules not named are untouched."""

    factors: Mapping[str, Factors]
