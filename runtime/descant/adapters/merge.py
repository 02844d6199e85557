"""Combinations of low-rank adapters, with the mathematics of PEFT's `add_weighted_adapter`.

`cat` and `svd` combine the members' updates; `cat` is exact, and `svd` is exact up to its truncation to a rank. The
other types prune each member's tensors (not at all, by magnitude, or at random), then join them (by a weighted sum, or
by a mean of the values that agree on a sign). Without the suffix `_svd` they apply this to the factors A and B
separately, with the root of the weight on each and its sign on A. With `_svd` they apply it to the updates, as
matrices, and truncate the result to a rank.

Weights include the members' scalings, so the scaling of the result is 1. A module that a member lacks is combined from
the other members. Unlike in PEFT, a single member is treated as several members are, ranks are compared per module, and
no setting is inherited.
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
    """The part of one member in one module."""

    member: int  # position of the member
    module: str
    factors: Factors
    weight: float

    @property
    def coefficient(self) -> float:
        """Factor on `b @ a`: weight times scaling."""
        return self.weight * self.factors.scaling


@dataclass(frozen=True, slots=True)
class _View:
    """A choice of the tensor of a part that is combined, and of its weight."""

    name: str
    values: Callable[[_Part], Tensor]
    weight: Callable[[_Part], float]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The two operations of a combination: `thin` prunes a tensor, given its key, and `join` combines the results."""

    thin: Callable[[Tensor, Combination, str], Tensor]
    join: Callable[[Sequence[Term], Combination], Tensor]


def combine(adapter: str, members: Sequence[tuple[LowRankAdapter, float]], how: Combination) -> LowRankAdapter:
    """Return the combination of weighted members, float32. Errors name it `adapter`.

    `how` has passed `combination.check`. A rank larger than a module's dimensions is reduced to them. The values that
    `dare` drops depend only on the seed, the member's position in `members`, the module, and A, B or update.

    Draft heads are left out: those of one member would draft badly for a combination, and heads never change a token. A
    single member with weight 1 keeps its heads.

    Raises:
        AdapterInvalid: the type needs equal ranks and they differ, or values are too large to be decomposed.
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
    """Raise AdapterInvalid for infinities, on which LAPACK would fail with an unclear error."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise AdapterInvalid(adapter, f"values of {module} are too large to be decomposed")


def _density(how: Combination) -> float:
    assert how.density is not None, "combination.check refuses such a type without a density"
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


# Factors are small and combined in float64. An update has the size of the module's weight, so it stays float32.
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
    """Return the adapter with the weighted sum of the members' updates in every module.

    A = [A1; A2; ...], B = [w1 * s1 * B1, w2 * s2 * B2, ...] with s the members' scalings. The rank is the sum of the
    members' ranks, and the scaling is 1. Weights may be negative. Draft heads are left out; see `combine`.
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
