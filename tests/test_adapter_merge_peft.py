"""Combinations equal those of PEFT, wherever PEFT is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_fixture as fixture
from descant.adapters.merge import combine
from descant.adapters.prune import drop_mask
from descant_client.lifecycle import Combination

few = settings(derandomize=True, deadline=None, max_examples=15)


def assert_as_peft(members: list[fixture.MemberSpec], how: Combination) -> None:
    model = fixture.peft_model(members)
    mine = combine("sum", fixture.members_of(model, members), how)

    assert fixture.distance(mine, fixture.updates(fixture.peft_combination(model, members, how))) < 1e-5


@few
@given(fixture.specs(is_mixed=True))
def test_cat_is_pefts(members: list[fixture.MemberSpec]) -> None:
    assert_as_peft(members, Combination("cat"))


@few
@given(fixture.specs(is_mixed=True), st.sampled_from([None, 1, 2, 3]))
def test_svd_is_pefts(members: list[fixture.MemberSpec], rank: int | None) -> None:
    assert_as_peft(members, Combination("svd", rank=rank))


@few
@given(fixture.specs(is_mixed=False))
def test_linear_is_pefts(members: list[fixture.MemberSpec]) -> None:
    assert_as_peft(members, Combination("linear"))


@pytest.mark.parametrize("method", ["total", "frequency"])
@few
@given(members=fixture.specs(is_mixed=False), density=fixture.densities)
def test_ties_is_pefts(method: Any, members: list[fixture.MemberSpec], density: float) -> None:
    assert_as_peft(members, Combination("ties", density=density, majority_sign_method=method))


@pytest.mark.parametrize("method", ["total", "frequency"])
@few
@given(members=fixture.specs(is_mixed=True), density=fixture.densities)
def test_ties_svd_is_pefts(method: Any, members: list[fixture.MemberSpec], density: float) -> None:
    assert_as_peft(members, Combination("ties_svd", density=density, majority_sign_method=method))


@few
@given(fixture.specs(is_mixed=False), fixture.densities)
def test_magnitude_prune_is_pefts(members: list[fixture.MemberSpec], density: float) -> None:
    assert_as_peft(members, Combination("magnitude_prune", density=density))


@few
@given(fixture.specs(is_mixed=True), fixture.densities, st.sampled_from([None, 1, 3]))
def test_magnitude_prune_svd_is_pefts(members: list[fixture.MemberSpec], density: float, rank: int | None) -> None:
    assert_as_peft(members, Combination("magnitude_prune_svd", density=density, rank=rank))


def keys(members: list[fixture.MemberSpec], how: Combination) -> list[str]:
    """Return the keys of our masks in the order in which PEFT draws its own."""
    views = ["update"] if how.type.endswith("_svd") else ["A", "B"]
    return [
        f"{how.seed}/{index}/{module}/{view}"
        for module in fixture.MODULES
        for view in views
        for index, member in enumerate(members)
        if module in member.modules
    ]


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
@few
@given(data=st.data())
def test_dare_is_pefts_if_it_drops_the_same(kind: Any, data: st.DataObject) -> None:
    members = data.draw(fixture.specs(is_mixed=kind.endswith("_svd")))
    how = Combination(kind, density=data.draw(fixture.densities), seed=data.draw(st.integers(0, 2**63 - 1)))
    remaining = keys(members, how)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        assert how.density is not None
        return drop_mask(probabilities.shape, how.density, remaining.pop(0)).float()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli)
        assert_as_peft(members, how)
    assert remaining == []


@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
@few
@given(data=st.data())
def test_a_clamp_is_pefts_if_its_singular_vectors_have_the_same_signs(kind: Any, data: st.DataObject) -> None:
    members = data.draw(fixture.specs(is_mixed=True))
    clamp = data.draw(st.sampled_from([0.9, 0.99, 1.0]))
    decompose = torch.linalg.svd

    def signed(matrix: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        u, s, vh = decompose(matrix, full_matrices=False)
        signs = torch.stack([row[row.abs().argmax()].sign() for row in vh])
        return u * signs, s, vh * signs[:, None]

    density = 0.5 if kind == "ties_svd" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", signed)
        assert_as_peft(members, Combination(kind, rank=1, clamp=clamp, density=density))
