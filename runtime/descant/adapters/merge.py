"""Combinations of low-rank adapters, with the mathematics of PEFT's `add_weighted_adapter`.

`cat` and `svd` work on the members' updates, exactly but for the rank that `svd` cuts off. The others thin out what
each member brings (not at all, by magnitude, or at random), then join it (by a weighted sum, or by a mean of those
that agree on a sign): as they are named, on the factors A and B apart, with the root of the weight on each and its
sign on A; with `_svd`, on the updates themselves, as matrices, and cut down to a rank in the end.

Weights include the members' scalings, so the result's is 1. A module that a member lacks is combined from the others.
Unlike PEFT, one member is treated as several are, ranks are compared module by module, and nothing is inherited.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descant.adapters.prune import Term, drop_random, elected_mean, keep_largest, weighted_total
from descant.adapters.truncate import truncated_matrix, truncated_product
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.errors import AdapterInvalid
from descant_client.lifecycle import Combination


@dataclass(frozen=True, slots=True)
class _Part:
    """What one member brings to one module."""

    member: int  # its position
    module: str
    factors: Factors
    weight: float

    @property
    def coefficient(self) -> float:
        """The weight of `b @ a`."""
        return self.weight * self.factors.scaling


@dataclass(frozen=True, slots=True)
class _View:
    """Which tensor of a part is combined, and with what weight."""

    name: str
    values: Callable[[_Part], Tensor]
    weight: Callable[[_Part], float]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How the tensors of the parts become one: `thin` gets a tensor and what names it, `join` what is left of all."""

    thin: Callable[[Tensor, Combination, str], Tensor]
    join: Callable[[Sequence[Term], Combination], Tensor]


def combine(adapter: str, members: Sequence[tuple[LowRankAdapter, float]], how: Combination) -> LowRankAdapter:
    """Return the combination of weighted members, float32. Errors call it `adapter`.

    `how` has passed `combination.check`. A rank that a module has no room for is cut down to what it has. What `dare`
    drops depends on the seed, the member's position in `members`, the module, and A, B or update; on nothing else.

    Draft heads are not combined: those of one member would draft badly for several, and as they never change a token,
    leaving them out changes none. One member alone, with weight 1, keeps its own.

    Raises:
        AdapterInvalid: the type needs equal ranks and they are not, or values are too large to be decomposed.
    """
    heads = members[0][0].heads if len(members) == 1 and members[0][1] == 1.0 else None
    return LowRankAdapter(_combined_factors(adapter, members, how), heads)


def _combined_factors(
    adapter: str, members: Sequence[tuple[LowRankAdapter, float]], how: Combination
) -> Mapping[str, Factors]:
    if how.type == "cat":
        return weighted_sum(members).factors
    rank = how.rank or max((pair.rank for member, _ in members for pair in member.factors.values()), default=1)
    factors: dict[str, Factors] = {}
    for module in dict.fromkeys(name for member, _ in members for name in member.factors):
        parts = [
            _Part(index, module, member.factors[module], weight)
            for index, (member, weight) in enumerate(members)
            if module in member.factors
        ]
        factors[module] = _combined(adapter, parts, how, rank)
    return factors


def _combined(adapter: str, parts: Sequence[_Part], how: Combination, rank: int) -> Factors:
    if how.type == "svd":
        left = torch.cat([part.factors.b.double() * part.coefficient for part in parts], dim=1)
        right = torch.cat([part.factors.a for part in parts])
        _check_finite(adapter, parts[0].module, left, right)
        return truncated_product(left, right, rank, how.clamp)
    if how.type.endswith("_svd"):
        update = _joined(parts, _UPDATE, how)
        _check_finite(adapter, parts[0].module, update)
        return truncated_matrix(update, rank, how.clamp)
    _check_ranks(adapter, parts, how)
    return Factors(_joined(parts, _A, how).float(), _joined(parts, _B, how).float())


def _joined(parts: Sequence[_Part], view: _View, how: Combination) -> Tensor:
    recipe = _RECIPES[how.type.removesuffix("_svd")]

    def term(part: _Part) -> Term:
        key = f"{how.seed}/{part.member}/{part.module}/{view.name}"
        return Term(view.weight(part), lambda: recipe.thin(view.values(part), how, key))

    return recipe.join([term(part) for part in parts], how)


def _check_ranks(adapter: str, parts: Sequence[_Part], how: Combination) -> None:
    ranks = [part.factors.rank for part in parts]
    if len(set(ranks)) > 1:
        cut = "svd" if how.type == "linear" else f"{how.type}_svd"
        reason = (
            f"its members have ranks {', '.join(map(str, ranks))} in {parts[0].module}, and {how.type} needs equal "
            f"ones. Use cat, which is exact, or {cut}"
        )
        raise AdapterInvalid(adapter, reason)


def _check_finite(adapter: str, module: str, *tensors: Tensor) -> None:
    """LAPACK fails on infinities in its own words."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise AdapterInvalid(adapter, f"values of {module} are too large to be decomposed")


def _density(how: Combination) -> float:
    assert how.density is not None, "combination.check lets no type without its density pass"
    return how.density


def _root(part: _Part) -> float:
    return math.sqrt(abs(part.coefficient))


def _keep_all(values: Tensor, how: Combination, key: str) -> Tensor:
    return values


def _prune(values: Tensor, how: Combination, key: str) -> Tensor:
    return keep_largest(values, _density(how))


def _drop(values: Tensor, how: Combination, key: str) -> Tensor:
    return drop_random(values, _density(how), key)


def _add(terms: Sequence[Term], how: Combination) -> Tensor:
    return weighted_total(terms)


def _elect(terms: Sequence[Term], how: Combination) -> Tensor:
    return elected_mean(terms, how.majority_sign_method)


# Factors are small and combined in float64. An update is as large as the module's weight, and stays float32.
_A = _View("A", lambda part: part.factors.a.double(), lambda part: math.copysign(_root(part), part.coefficient))
_B = _View("B", lambda part: part.factors.b.double(), _root)
_UPDATE = _View("update", lambda part: part.factors.scaled_b() @ part.factors.a, lambda part: part.weight)

_RECIPES: Mapping[str, _Recipe] = {
    "linear": _Recipe(_keep_all, _add),
    "ties": _Recipe(_prune, _elect),
    "dare_linear": _Recipe(_drop, _add),
    "dare_ties": _Recipe(_drop, _elect),
    "magnitude_prune": _Recipe(_prune, _add),
}


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
