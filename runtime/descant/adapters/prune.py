"""The operations of combinations on tensors: pruning of values, and joining of pruned tensors."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """A weighted tensor of a sum. `values` computes it at each call, because all tensors together may be too large."""

    weight: float
    values: Callable[[], Tensor]


def keep_largest(values: Tensor, density: float) -> Tensor:
    """Return `values` with all but the `density` share of largest magnitude, rounded down, set to zero.

    Of equal magnitudes the earlier ones are kept, so that the result is the same on every machine.
    """
    num_kept = int(density * values.numel())
    if num_kept == 0:
        return torch.zeros_like(values)
    magnitudes = values.abs().flatten()
    threshold = magnitudes.kthvalue(magnitudes.numel() - num_kept + 1).values
    is_kept = magnitudes > threshold
    if threshold > 0:  # else the remaining values are zero anyway
        at_threshold = (magnitudes == threshold).nonzero()[:, 0]
        is_kept[at_threshold[: num_kept - int(is_kept.sum())]] = True
    return values * is_kept.view_as(values)


def drop_mask(shape: Sequence[int], density: float, key: str) -> Tensor:
    """Return a bool mask of the values that a random drop keeps: each independently with probability `density`.

    The mask depends on `key` alone: it comes from torch's CPU generator (mt19937), seeded with a hash of the key.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float32) < density


def drop_random(values: Tensor, density: float, key: str) -> Tensor:
    """Return `values` with random ones set to zero and the others divided by `density`, which preserves the mean."""
    return values * drop_mask(values.shape, density, key) / density


def weighted_total(terms: Sequence[Term]) -> Tensor:
    """Return the sum of the terms."""
    total = terms[0].values() * terms[0].weight
    for term in terms[1:]:
        total += term.values() * term.weight
    return total


def elected_mean(terms: Sequence[Term], method: Literal["total", "frequency"]) -> Tensor:
    """Return, per element, the weighted mean over the terms that have the majority's sign; 0 if none has.

    The majority is the sign of the sum of values ("total") or of the sum of their signs ("frequency"), without weights;
    plus if that sum is zero. The mean divides by the number of terms, not by their weights.
    """
    votes = torch.zeros_like(terms[0].values())
    for term in terms:
        votes += term.values() if method == "total" else term.values().sign()
    is_positive = votes >= 0
    total, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for term in terms:
        values = term.values()
        agrees = torch.where(is_positive, values > 0, values < 0)
        total += values * agrees * term.weight
        count += agrees
    return total / count.clamp(min=1)
