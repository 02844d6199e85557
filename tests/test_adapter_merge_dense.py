"""Combinations equal slow, obvious arithmetic in float64, also where PEFT is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_fixture as fixture
from descant.adapters.merge import combine
from descant.adapters.prune import drop_mask
from descant.versions.low_rank import Factors, LowRankAdapter
from descant_client.lifecycle import Combination

few = settings(derandomize=True, deadline=None, max_examples=8)
PRUNING = ["ties", "magnitude_prune", "dare_linear", "dare_ties"]


def drawn(data: st.DataObject, is_mixed: bool) -> fixture.Members:
    """Return members: possibly one alone, with rsLoRA first and negative scalings."""
    specs = data.draw(fixture.specs(is_mixed, min_size=1))
    specs[0] = dataclasses.replace(specs[0], is_rslora=data.draw(st.booleans()))
    members = fixture.members_of(fixture.peft_model(specs), specs)
    return [(scaled(member, data.draw(st.sampled_from([1.0, -0.5]))), weight) for member, weight in members]


def scaled(adapter: LowRankAdapter, factor: float) -> LowRankAdapter:
    return LowRankAdapter(
        {name: Factors(pair.a, pair.b, pair.scaling * factor) for name, pair in adapter.factors.items()}
    )


def weighted_sum(members: fixture.Members) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for member, weight in members:
        for name, update in fixture.updates(member).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weight * update
    return total


def thinning(how: Combination) -> fixture.Thin:
    """Return the pruning of a combination type, for one tensor."""
    density = how.density or 0.0
    if how.type.startswith("dare"):
        return lambda values, key: (
            np.where(drop_mask(values.shape, density, f"{how.seed}/{key}").numpy(), values, 0.0) / density
        )
    return fixture.slow_prune(density)


@few
@given(st.data())
def test_cat_is_the_sum(data: st.DataObject) -> None:
    members = drawn(data, is_mixed=True)
    ranks = {name: sum(m.factors[name].rank for m, _ in members if name in m.factors) for name in fixture.MODULES}

    combined = combine("sum", members, Combination("cat"))

    assert fixture.distance(combined, weighted_sum(members)) < 2e-7
    assert all(pair.rank == ranks[name] and pair.scaling == 1 for name, pair in combined.factors.items())


def test_cat_of_many_is_the_sum() -> None:
    specs = [fixture.MemberSpec(0.3 * index - 8, rank=1 + index % 7, seed=index) for index in range(64)]
    members = fixture.members_of(fixture.peft_model(specs), specs)

    assert fixture.distance(combine("sum", members, Combination("cat")), weighted_sum(members)) < 2e-7


@few
@given(st.data(), st.sampled_from([1, 2, 3, 100]))
def test_svd_is_the_nearest_of_its_rank(data: st.DataObject, rank: int) -> None:
    members = drawn(data, is_mixed=True)

    combined = combine("sum", members, Combination("svd", rank=rank))

    assert fixture.distance(combined, fixture.best_of_rank(weighted_sum(members), rank)) < 1e-6
    assert all(1 <= pair.rank <= min(rank, *fixture.MODULES[name]) for name, pair in combined.factors.items())


@few
@given(st.data())
def test_linear_is_the_product_of_sums(data: st.DataObject) -> None:
    members = drawn(data, is_mixed=False)

    combined = combine("sum", members, how := Combination("linear"))

    assert fixture.distance(combined, fixture.slow_combination(members, how, fixture.keep_all)) < 1e-6


@pytest.mark.parametrize("kind", PRUNING)
@few
@given(data=st.data())
def test_what_prunes_factors_is_as_it_reads(kind: Any, data: st.DataObject) -> None:
    members = drawn(data, is_mixed=False)
    method: Any = data.draw(st.sampled_from(["total", "frequency"])) if "ties" in kind else "total"
    density, seed = data.draw(st.sampled_from([0.01, 0.4, 1.0])), data.draw(st.integers(0, 99))
    how = Combination(kind, density=density, seed=seed, majority_sign_method=method)

    combined = combine("sum", members, how)

    assert fixture.distance(combined, fixture.slow_combination(members, how, thinning(how))) < 1e-6


@pytest.mark.parametrize("kind", [f"{kind}_svd" for kind in PRUNING])
@few
@given(data=st.data())
def test_what_prunes_updates_is_as_it_reads(kind: Any, data: st.DataObject) -> None:
    members = drawn(data, is_mixed=True)
    density, rank = data.draw(st.sampled_from([0.01, 0.4, 1.0])), data.draw(st.sampled_from([1, 2, 100]))
    method: Any = data.draw(st.sampled_from(["total", "frequency"])) if "ties" in kind else "total"
    how = Combination(kind, rank=rank, density=density, seed=5, majority_sign_method=method)

    combined = combine("sum", members, how)

    judge = fixture.best_of_rank(fixture.slow_combination(members, how, thinning(how)), rank)
    assert fixture.distance(combined, judge) < 1e-5


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
@pytest.mark.parametrize("weight", [0.7, -1.3, 0.0])
def test_one_member_is_itself_times_its_weight(kind: Any, weight: float) -> None:
    specs = [fixture.MemberSpec(weight, rank=4, is_rslora=True)]
    members = fixture.members_of(fixture.peft_model(specs), specs)

    assert fixture.distance(combine("sum", members, Combination(kind)), weighted_sum(members)) < 2e-7


@pytest.mark.parametrize("kind", ["linear", "dare_linear"])
def test_rslora_first_is_right_where_peft_is_not(kind: Any) -> None:
    specs = [fixture.MemberSpec(1.0, rank=4, is_rslora=True), fixture.MemberSpec(-2.0, rank=4, seed=1)]
    model = fixture.peft_model(specs)
    members = fixture.members_of(model, specs)
    how = Combination(kind, density=None if kind == "linear" else 1.0)
    judge = fixture.slow_combination(members, how, fixture.keep_all)

    mine = combine("sum", members, how)

    assert fixture.distance(mine, judge) < 1e-6
    if kind == "linear":
        assert fixture.distance(fixture.peft_combination(model, specs, how), judge) > 0.9
