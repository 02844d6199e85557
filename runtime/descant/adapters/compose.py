"""Weighted sums of low-rank adapters: exact, by concatenating ranks."""

from collections.abc import Sequence

import torch

from descant.adapters.low_rank import Factors, LowRankAdapter


def weighted_sum(members: Sequence[tuple[LowRankAdapter, float]]) -> LowRankAdapter:
    """Return the adapter whose update is the weighted sum of the members' updates, in every module.

    A = [A1; A2; ...], B = [w1 * s1 * B1, w2 * s2 * B2, ...] with s the members' scalings: its rank is the sum of
    theirs, its scaling 1. Weights may be negative. Draft heads are left out, as `merge.combine` explains.
    """
    names = dict.fromkeys(name for member, _ in members for name in member.factors)
    factors: dict[str, Factors] = {}
    for name in names:
        parts = [(member.factors[name], weight) for member, weight in members if name in member.factors]
        factors[name] = Factors(
            torch.cat([part.a for part, _ in parts]),
            torch.cat([part.b * (weight * part.scaling) for part, weight in parts], dim=1),
        )
    return LowRankAdapter(factors)
