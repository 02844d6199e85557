"""Guesses: the likeliest trees of what heads propose, what several guesses have in common, and what is left of them."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descant.scheduling.speculation.guess import Guess, merged, of_heads, of_text, of_ways, pruned
from descant.scheduling.speculation.ngram import DraftTree

Likelihoods = list[list[float]]


def ways(guess: Guess) -> dict[tuple[int, ...], float]:
    """Every node by the tokens on the way to it."""
    found: list[tuple[int, ...]] = []
    for token_id, parent in zip(*guess.tree, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token_id))
    return dict(zip(found, guess.probabilities, strict=True))


@st.composite
def guesses(draw: st.DrawFn) -> Guess:
    token_ids, parents, likelihoods = list[int](), list[int](), list[float]()
    for node in range(draw(st.integers(1, 12))):
        parent = draw(st.integers(-1, node - 1))
        taken = {token_ids[i] for i in range(node) if parents[i] == parent}
        token_ids.append(draw(st.integers(0, 20).filter(lambda one, taken=taken: one not in taken)))
        parents.append(parent)
        likelihoods.append(draw(st.floats(0, 1)) * (likelihoods[parent] if parent >= 0 else 1.0))
    return Guess(DraftTree(tuple(token_ids), tuple(parents)), tuple(likelihoods))


@st.composite
def candidates(draw: st.DrawFn) -> tuple[list[list[int]], Likelihoods]:
    num_heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = [sorted((draw(st.floats(0.01, 1)) for _ in range(width)), reverse=True) for _ in range(num_heads)]
    return [draw(st.permutations(range(5)))[:width] for _ in range(num_heads)], rows


@given(candidates(), st.integers(1, 3), st.integers(1, 40))
def test_heads_make_the_tree_of_the_likeliest_ways(
    proposed: tuple[list[list[int]], Likelihoods], max_width: int, max_nodes: int
) -> None:
    token_ids, likelihoods = proposed
    everything: dict[tuple[int, ...], float] = {}
    for depth in range(1, len(token_ids) + 1):
        for ranks in product(range(min(max_width, len(token_ids[0]))), repeat=depth):
            way = tuple(token_ids[i][rank] for i, rank in enumerate(ranks))
            everything[way] = prod(likelihoods[i][rank] for i, rank in enumerate(ranks))

    guess = of_heads(token_ids, likelihoods, max_width, max_nodes)

    assert guess is not None
    found = ways(guess)
    assert len(found) == min(max_nodes, len(everything))
    assert all(found[way] == pytest.approx(everything[way]) for way in found)
    assert sorted(found.values()) == pytest.approx(sorted(everything.values())[-len(found) :])


WAYS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=12).map(
    lambda drawn: [list(way) for way in dict.fromkeys(tuple(way[:n]) for way in drawn for n in range(1, len(way) + 1))]
)


@given(WAYS, candidates(), st.integers(1, 40))
def test_a_tree_of_a_given_shape_has_the_nodes_whose_candidates_are_there(
    shape: list[list[int]], proposed: tuple[list[list[int]], Likelihoods], max_nodes: int
) -> None:
    token_ids, likelihoods = proposed
    there = [way for way in shape if len(way) <= len(token_ids) and max(way) < len(token_ids[0])]
    expected = {
        tuple(token_ids[i][rank] for i, rank in enumerate(way)): prod(
            likelihoods[i][rank] for i, rank in enumerate(way)
        )
        for way in sorted(there, key=len)[:max_nodes]
    }

    guess = of_ways(shape, token_ids, likelihoods, max_nodes)

    assert ({} if guess is None else ways(guess)) == pytest.approx(expected)


def test_one_candidate_of_each_head_makes_a_chain() -> None:
    guess = of_heads([[7, 8], [5, 6]], [[0.6, 0.3], [0.5, 0.4]], 1, 64)

    assert guess == Guess(DraftTree((7, 5), (-1, 0)), (0.6, 0.3))


@given(st.lists(guesses(), min_size=1, max_size=3))
def test_what_is_merged_has_every_way_once_at_its_surest(several: list[Guess]) -> None:
    expected: dict[tuple[int, ...], float] = {}
    for guess in several:
        for way, likelihood in ways(guess).items():
            expected[way] = max(likelihood, expected.get(way, 0.0))

    found = merged(several)

    assert found is not None
    assert ways(found) == expected
    assert len(found.tree.token_ids) == len(expected)


@given(guesses(), st.floats(0, 1), st.integers(0, 12))
def test_what_is_pruned_keeps_the_likeliest_ways(guess: Guess, least: float, max_nodes: int) -> None:
    likely = sorted((one for one in guess.probabilities if one >= least), reverse=True)[:max_nodes]

    kept = pruned(guess, least, max_nodes)

    if kept is None:
        assert likely == []
    else:
        before = ways(guess)
        assert all(before[way] == likelihood for way, likelihood in ways(kept).items())
        assert sorted(kept.probabilities, reverse=True) == likely


def test_a_later_continuation_is_less_likely_than_what_the_first_one_leaves() -> None:
    guess = of_text(DraftTree((1, 2, 3, 4), (-1, 0, -1, 2)), 0.8)

    assert guess.probabilities == pytest.approx((0.8, 0.64, 0.1, 0.08))
