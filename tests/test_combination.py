"""Combinations of adapters are checked before the worker gets them."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from descant.requests.combination import check_combination, from_lorax
from descant_client.errors import InvalidRequest
from descant_client.lifecycle import Combination, CombinationType
from descant_client.protocol import MergedAdapters
from descant_client.wire import WeightedAdapter

ONE = (WeightedAdapter("a", 1.0),)
EXACT = {"cat", "linear", "svd"}
EVERY = get_args(CombinationType)


def refused(combination: Combination) -> str | None:
    """Return the field for which a combination is refused."""
    try:
        check_combination(combination, ONE)
    except InvalidRequest as error:
        return error.field
    return None


def with_needs(kind: Any, **values: Any) -> Combination:
    needs: dict[str, Any] = {} if kind in EXACT else {"density": 0.5}
    return Combination(kind, **needs | values)


@pytest.mark.parametrize("kind", EVERY)
def test_a_type_with_what_it_needs_is_taken(kind: Any) -> None:
    assert refused(with_needs(kind)) is None


@pytest.mark.parametrize("kind", EVERY)
def test_density_is_for_what_prunes_which_needs_it(kind: Any) -> None:
    is_exact = kind in EXACT

    assert refused(Combination(kind)) == (None if is_exact else "combination.density")
    assert refused(Combination(kind, density=1.0)) == ("combination.density" if is_exact else None)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(("name", "value"), [("rank", 4), ("clamp", 0.9)])
def test_rank_and_clamp_are_for_svd(kind: Any, name: str, value: float) -> None:
    expected = None if kind in {"svd", *(each for each in EVERY if each.endswith("_svd"))} else f"combination.{name}"

    assert refused(with_needs(kind, **{name: value})) == expected


@pytest.mark.parametrize("kind", EVERY)
def test_a_seed_is_for_dare_and_a_majority_for_ties(kind: Any) -> None:
    seed, majority = with_needs(kind, seed=3), with_needs(kind, majority_sign_method="frequency")

    assert refused(seed) == (None if "dare" in kind else "combination.seed")
    assert refused(majority) == (None if "ties" in kind else "combination.majority_sign_method")


@pytest.mark.parametrize(("clamp", "expected"), [(0.5, "combination.clamp"), (0.51, None), (1.0, None)])
def test_a_clamp_is_above_the_median(clamp: float, expected: str | None) -> None:
    assert refused(Combination("svd", clamp=clamp)) == expected


@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_a_weight_is_finite(weight: float) -> None:
    with pytest.raises(InvalidRequest, match="finite"):
        check_combination(Combination(), [*ONE, WeightedAdapter("b", weight)])


def test_lorax_without_anything_else_is_linear_with_weights_of_1() -> None:
    assert from_lorax(MergedAdapters(["a", "b"])) == (
        (WeightedAdapter("a", 1.0), WeightedAdapter("b", 1.0)),
        Combination("linear"),
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("Linear", Combination("linear")),
        ("TIES", Combination("ties", density=0.4, majority_sign_method="frequency")),
        ("dare_Linear", Combination("dare_linear", density=0.4)),
        ("dare_ties", Combination("dare_ties", density=0.4, majority_sign_method="frequency")),
    ],
)
def test_lorax_strategies_are_known_in_any_case_and_pass_the_check(strategy: str, expected: Combination) -> None:
    merged = MergedAdapters(["a", "b"], [0.5, -2.0], strategy, 0.4, "Frequency")

    members, combination = from_lorax(merged)
    check_combination(combination, members)

    assert members == (WeightedAdapter("a", 0.5), WeightedAdapter("b", -2.0))
    assert combination == expected


def test_lorax_without_a_method_counts_totals() -> None:
    _, combination = from_lorax(MergedAdapters(["a"], [1.0], "ties", 0.4))

    assert combination.majority_sign_method == "total"


@pytest.mark.parametrize("density", [1.0, 1.5])
def test_lorax_densities_from_1_on_keep_everything(density: float) -> None:
    _, combination = from_lorax(MergedAdapters(["a"], [1.0], "ties", density))

    assert combination.density == 1.0


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weights": [1.0]}, "weights"),
        ({"weights": [1.0, 1.0, 1.0]}, "weights"),
        ({"merge_strategy": "svd"}, "merge_strategy"),
        ({"merge_strategy": ""}, "merge_strategy"),
        ({"majority_sign_method": "mean"}, "majority_sign_method"),
        ({"merge_strategy": "ties"}, "density"),
        ({"merge_strategy": "dare_linear", "density": -0.5}, "density"),
        ({"merge_strategy": "dare_ties", "density": math.nan}, "density"),
    ],
)
def test_lorax_is_refused_by_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        from_lorax(MergedAdapters(["a", "b"], **values))

    assert refusal.value.field == f"merged_adapters.{field}"
