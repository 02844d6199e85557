"""Only a sequence that ends the executor alone is blamed, and every such one is found."""

from __future__ import annotations

from math import ceil, log2

from hypothesis import given, settings
from hypothesis import strategies as st

from descant.scheduling.blame import Blame, Verdict


def test_one_death_proves_nothing() -> None:
    blame = Blame()

    assert blame.on_executor_lost([1]) == Verdict(None, is_narrower=False)
    assert blame.trial is None


def test_who_dies_alone_twice_is_the_culprit() -> None:
    blame = Blame()
    blame.on_executor_lost([1])

    assert blame.on_executor_lost([1]) == Verdict(1, is_narrower=True)
    assert blame.trial is None
    assert not blame.is_watching


def test_a_token_between_two_deaths_clears() -> None:
    blame = Blame()
    blame.on_executor_lost([1])
    blame.on_token(1)

    assert blame.on_executor_lost([1]) == Verdict(None, is_narrower=False)


def test_suspects_are_tried_in_halves() -> None:
    blame = Blame()
    blame.on_executor_lost([1, 2, 3, 4])

    assert blame.on_executor_lost([1, 2, 3, 4]).is_narrower
    assert blame.trial == {1, 2}
    assert not blame.allows(3)


def test_the_next_half_is_tried_once_each_of_the_first_has_gained_a_token_or_is_gone() -> None:
    blame = Blame()
    blame.on_executor_lost([1, 2, 3, 4])
    blame.on_executor_lost([1, 2, 3, 4])

    blame.on_token(1)
    assert blame.trial == {1, 2}
    blame.on_finished(2)
    assert blame.trial == {3, 4}


def test_a_suspect_that_leaves_before_its_turn_is_not_waited_for() -> None:
    blame = Blame()
    for _ in range(2):
        blame.on_executor_lost([1, 2])

    blame.on_finished(2)
    blame.on_token(1)

    assert blame.trial is None


def test_the_trial_ends_when_all_are_cleared() -> None:
    blame = Blame()
    blame.on_executor_lost([1, 2])
    blame.on_executor_lost([1, 2])
    blame.on_token(1)
    blame.on_token(2)

    assert blame.trial is None
    assert blame.allows(5)


def test_those_who_were_not_in_the_fatal_step_are_tried_later() -> None:
    blame = Blame()
    for _ in range(2):
        blame.on_executor_lost([1, 2, 3, 4])

    assert blame.on_executor_lost([2]) == Verdict(2, is_narrower=True)
    assert blame.trial == {1}


def test_a_cleared_member_is_not_blamed_for_the_death_of_its_half() -> None:
    blame = Blame()
    for _ in range(2):
        blame.on_executor_lost([1, 2, 3, 4])
    blame.on_token(1)

    assert blame.on_executor_lost([1, 2]) == Verdict(None, is_narrower=True)
    assert blame.trial == {2}
    assert blame.on_executor_lost([2]).culprit == 2


def test_a_death_of_nobody_changes_nothing() -> None:
    blame = Blame()
    for _ in range(2):
        blame.on_executor_lost([1, 2])

    assert blame.on_executor_lost([]) == Verdict(None, is_narrower=False)
    assert blame.trial == {1}


@settings(deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=5), st.integers(1, 40))
def test_all_poison_is_found_and_nothing_else(count: int, poison: set[int], num_seats: int) -> None:
    blame, alive, found = Blame(), list(range(count)), list[int]()
    poison &= set(alive)
    num_deaths = 0
    while poison - set(found):
        step = [member for member in alive if blame.allows(member)][:num_seats]
        if poison & set(step):
            num_deaths += 1
            verdict = blame.on_executor_lost(step)
            found += [] if verdict.culprit is None else [verdict.culprit]
            alive = [member for member in alive if member not in found]
            continue
        for member in step:
            blame.on_token(member)
        alive = [member for member in alive if member not in step]  # one token each

    assert set(found) == poison
    assert num_deaths <= len(poison) * (ceil(log2(count + 1)) + 3)
