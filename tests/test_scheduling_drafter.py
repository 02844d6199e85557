"""What a drafter guesses of a text, and how far it believes what it guesses from."""

from __future__ import annotations

import pytest

from descant.contract.plan import HeadCandidates, pack_floats, pack_ints
from descant.scheduling.sequence import Sequence
from descant.scheduling.speculation.drafting import Drafter, depth_of
from descant.scheduling.speculation.ngram import DraftTree
from descant_client.speculation import Speculation
from fakes import make_sequence


def text(token_ids: list[int]) -> Sequence:
    return make_sequence(1, token_ids)


@pytest.mark.parametrize(
    "candidates",
    [
        HeadCandidates(0, b"", b""),
        HeadCandidates(1, b"cut", b"off"),
        HeadCandidates(2, pack_ints([1]), pack_floats([0.5])),
        HeadCandidates(1, pack_ints([1, 2]), pack_floats([0.5])),
        HeadCandidates(1, pack_ints([1]), pack_floats([float("nan")])),
        HeadCandidates(1, pack_ints([1]), pack_floats([2.0])),
    ],
)
def test_candidates_that_make_no_sense_are_dropped(candidates: HeadCandidates) -> None:
    drafter = Drafter(Speculation(ngram=False))

    drafter.take_candidates(3, candidates)

    assert drafter.guess(text([1, 2, 3]), 64) is None
    assert drafter.head_likelihoods == []


def test_a_long_prompt_is_read_part_by_part() -> None:
    drafter, sequence = Drafter(), text([7, *range(10, 100), 7, *range(10, 13)])

    assert drafter.read(sequence, 60) == 60
    assert drafter.guess(sequence, 64) is None
    assert drafter.read(sequence, 60) == sequence.num_tokens - 60
    assert drafter.guess(sequence, 64) is not None


def test_candidates_are_good_for_one_place_only() -> None:
    drafter, sequence = Drafter(Speculation(ngram=False)), text([1, 2, 3])
    candidates = HeadCandidates(1, pack_ints([7, 8]), pack_floats([0.9, 0.8]))

    drafter.take_candidates(3, candidates)
    guess = drafter.guess(sequence, 64)
    drafter.take_candidates(2, candidates)

    assert guess is not None
    assert guess.tree == DraftTree((7, 8), (-1, 0))
    assert drafter.guess(sequence, 64) is None


def test_heads_that_were_wrong_are_believed_less() -> None:
    drafter, said = Drafter(Speculation(ngram=False)), [1, 2, 3]
    for _ in range(20):
        drafter.take_candidates(len(said), HeadCandidates(1, pack_ints([7]), pack_floats([0.9])))
        drafter.read(text([*said, 9]), 64)
        said.append(9)

    drafter.take_candidates(len(said), HeadCandidates(1, pack_ints([7]), pack_floats([0.9])))
    guess = drafter.guess(text(said), 64)

    assert guess is not None
    assert guess.probabilities[0] < 0.2


def test_the_depth_of_a_tree_is_that_of_its_longest_branch() -> None:
    assert depth_of((-1, 0, -1, 1)) == 3


def test_a_guess_is_what_followed_the_same_tokens_before() -> None:
    sequence = text([1, 2, 3, 4, 5, 6, 7, 2, 3])

    drafter = Drafter(Speculation(always=True))
    drafter.read(sequence, 64)
    guess = drafter.guess(sequence, 3)

    assert guess is not None
    assert guess.tree == DraftTree((4, 5, 6), (-1, 0, 1))


def test_a_text_that_says_nothing_for_long_is_read_several_tokens_at_a_time() -> None:
    drafter, always, said = Drafter(), Drafter(Speculation(always=True)), [1]
    read: list[int] = []
    for token_id in range(2, 200):  # never one twice
        said.append(token_id)
        read.append(drafter.read(text(said), 64))
        drafter.guess(text(said), 4)
        assert always.read(text(said), 64)
        always.guess(text(said), 4)

    assert read[:3] == [2, 1, 1]
    assert read[-16:].count(4) == 4
    assert sum(read[-16:]) == 16


def test_a_text_that_repeats_itself_after_all_is_soon_read_token_by_token() -> None:
    drafter, said = Drafter(), list(range(1, 200))
    for count in range(1, len(said) + 1):
        drafter.read(text(said[:count]), 64)
        drafter.guess(text(said[:count]), 4)

    silent = 0
    for token_id in range(50, 90):  # what it has said before
        said.append(token_id)
        drafter.read(text(said), 64)
        silent += drafter.guess(text(said), 4) is None

    assert silent <= 4


def test_each_head_is_believed_as_often_as_it_was_right() -> None:
    drafter, said = Drafter(Speculation(ngram=False)), [1, 2, 3]
    for token_id in range(20, 80):
        candidates = HeadCandidates(1, pack_ints([token_id, 7]), pack_floats([0.9, 0.9]))  # the second one never
        drafter.take_candidates(len(said), candidates)
        said.append(token_id)
        drafter.read(text(said), 64)

    drafter.take_candidates(len(said), HeadCandidates(1, pack_ints([80, 7]), pack_floats([0.9, 0.9])))
    guess = drafter.guess(text(said), 64)

    assert guess is not None
    assert guess.probabilities[0] > 0.85
    assert guess.probabilities[1] < 0.1


def test_a_promise_that_was_broken_is_not_held_against_anybody_for_ever() -> None:
    drafter, said = Drafter(), [1]
    drafter.expect(10.0)
    drafter.learn(16, 0)
    assert drafter.acceptance_share < 0.3

    for token_id in range(2, 80):
        said.append(token_id)
        drafter.read(text(said), 64)

    assert drafter.acceptance_share > 0.8


def test_nothing_is_kept_of_a_text_that_has_ended() -> None:
    drafter = Drafter()
    drafter.read(text([1, 2, 3, 1, 2]), 64)
    drafter.take_candidates(5, HeadCandidates(1, pack_ints([7]), pack_floats([0.9])))

    drafter.forget_text()

    assert drafter.guess(text([1, 2, 3, 1, 2]), 4) is None


def test_heads_are_good_for_all_the_nodes_of_their_tree() -> None:
    drafter = Drafter(Speculation(ngram=False, max_width=2))

    drafter.take_candidates(3, HeadCandidates(2, pack_ints([7, 8, 5, 6]), pack_floats([0.5, 0.4, 0.5, 0.4])))

    assert drafter.heads_gain(0.0) == pytest.approx(0.5 + 0.4 + 0.25 + 0.2 + 0.2 + 0.16)
    assert drafter.heads_gain(0.3) == pytest.approx(0.2 + 0.1)
