"""Weighted sums of low-rank adapters: exact, by concatenating ranks."""

from collections.abc import Sequence

import torch

from descant.adapters.low_rank import Factors, LowRankAdapter


def weighted_sum(members: Sequence[tuple[LowRankAdapter, float]]) -> LowRankAdapter:
    """Return the adapter whose update is the weighted sum of the members' updates, in every module.

    A = [A1; A2; ...], B = [w1 * B1, w2 * B2, ...]: its rank is the sum of theirs. Weights may be negative.
    """
    names = dict.fromkeys(name for member, _ in members for name in member.factors)
    factors: dict[str, Factors] = {}
    for name in names:
        parts = [(member.factors[name], weight) for member, weight in members if name in member.factors]
        factors[name] = Factors(
            torch.cat([part.a for part, _ in parts]), torch.cat([part.b * weight for part, weight in parts], dim=1)
        )
    return LowRankAdapter(factors)
