"""What verifying costs, learned from steps, and which guesses are then worth it."""

from __future__ import annotations

import random

import msgspec
import pytest

from decode_steps import chain, learn, plan
from descant.contract.plan import HeadCandidates, StepPlan, pack_floats, pack_ints
from descant.scheduling.speculation.doubt import LOWER_EVERY, RAISED, STEPS
from descant.scheduling.speculation.draft_choice import PROBE_EVERY, PROBE_NODES, DraftChoice
from descant.scheduling.speculation.drafting import Drafter
from descant.scheduling.speculation.guess import Guess
from descant.scheduling.speculation.ngram import DraftTree
from descant_client.speculation import Speculation
from fake_engine import LIMITS, FakeEngine
from fake_model import echo, hash_history
from fakes import Loop


def taught(any_draft: float, node: float, num_rows: int = 1) -> DraftChoice:
    """A choice that has seen what steps take, in shares of a plain step; its drafts were worth it."""
    choice = DraftChoice()
    for _ in range(40):
        for nodes in (1, 4, 0, 8, 0):
            seconds = 1.0 + (any_draft + node * nodes if nodes else 0.0)
            learn(choice, plan(num_rows, nodes), seconds, num_accepted=10 * num_rows * nodes)
    return choice


def least(choice: DraftChoice, num_rows: int) -> float:
    return choice.for_step(num_rows, is_forced=False).least_likelihood


def num_asked(choice: DraftChoice, drafter: Drafter, digest: str, num_rows: int) -> int:
    return choice.for_step(num_rows, is_forced=False).num_candidates(drafter, digest)


def choose(choice: DraftChoice, guesses: dict[int, tuple[Drafter, Guess]], num_rows: int) -> dict[int, DraftTree]:
    is_forced = any(drafter.settings.always for drafter, _ in guesses.values())
    return choice.for_step(num_rows, is_forced=is_forced).choose(guesses)


def chosen(choice: DraftChoice, num_rows: int, *guesses: Guess) -> dict[int, int]:
    trees = choose(choice, {i: (Drafter(), guess) for i, guess in enumerate(guesses)}, num_rows)
    return {key: len(tree.token_ids) for key, tree in trees.items()}


def test_as_many_nodes_are_verified_as_make_the_step_better() -> None:
    choice = taught(any_draft=0.05, node=0.1)

    assert chosen(choice, 1, chain(0.9, 0.8, 0.6, 0.1, 0.05)) == {0: 3}


def test_the_likeliest_nodes_are_taken_of_whatever_sequence() -> None:
    choice = taught(any_draft=0.05, node=0.1, num_rows=2)

    assert chosen(choice, 2, chain(0.9, 0.1), chain(0.15), chain(0.8, 0.7)) == {0: 1, 2: 2}


def test_nothing_is_verified_where_it_would_cost_more_than_it_brings() -> None:
    assert chosen(taught(any_draft=0.05, node=0.5), 1, chain(0.4, 0.3)) == {}
    assert chosen(taught(any_draft=3.0, node=0.0), 1, chain(0.9, 0.8)) == {}


def test_the_more_rows_wait_the_likelier_a_node_must_be() -> None:
    assert chosen(taught(0.0, 0.1, num_rows=2), 2, chain(0.5)) == {0: 1}
    assert chosen(taught(0.0, 0.1, num_rows=8), 8, chain(0.5)) == {}


def test_nothing_is_verified_before_a_plain_step_was_measured() -> None:
    assert chosen(DraftChoice(), 1, chain(0.9)) == {}


def test_after_many_plain_steps_a_few_nodes_are_tried_again() -> None:
    choice = taught(any_draft=5.0, node=1.0)
    for _ in range(PROBE_EVERY - 1):
        assert chosen(choice, 1, chain(*[0.9] * 9)) == {}
        learn(choice, plan(1), 1.0)

    assert chosen(choice, 1, chain(0.2), chain(*[0.9] * 9)) == {1: PROBE_NODES}


def test_the_more_tries_were_in_vain_the_longer_until_the_next() -> None:
    choice, sure = taught(any_draft=5.0, node=1.0), chain(*[0.9] * 9)
    learn(choice, plan(1, PROBE_NODES), 10.0)
    waits: list[int] = []
    for _ in range(6):
        waits.append(0)
        while not chosen(choice, 1, sure):
            learn(choice, plan(1), 1.0)
            waits[-1] += 1
        learn(choice, plan(1, PROBE_NODES), 10.0)

    assert waits[:4] == [PROBE_EVERY << number for number in range(4)]  # until what it cost is believed no more


def test_after_many_steps_with_drafts_a_plain_one_is_measured_again() -> None:
    choice = taught(any_draft=0.0, node=0.01)
    for _ in range(PROBE_EVERY):
        assert chosen(choice, 1, chain(0.9)) == {0: 1}
        learn(choice, plan(1, 1), 1.0)

    assert least(choice, 1) > 1
    learn(choice, plan(1), 1.0)
    assert chosen(choice, 1, chain(0.9)) == {0: 1}


def test_who_always_verifies_does_so_at_any_cost() -> None:
    choice = taught(any_draft=9.0, node=9.0)

    trees = choose(choice, {7: (Drafter(Speculation(always=True)), chain(0.1, 0.1))}, 1)

    assert len(trees[7].token_ids) == 2


def test_a_single_node_that_pays_is_never_lost_to_rounding() -> None:
    choice, dice = taught(any_draft=0.0, node=0.01), random.Random(2)
    for _ in range(500):
        drafter = Drafter()
        drafter.expect(dice.uniform(1, 3))
        drafter.learn(3, 1)

        assert choose(choice, {0: (drafter, chain(dice.uniform(0.5, 1)))}, 1)


def test_who_always_verifies_holds_up_nobody_else() -> None:
    choice, always = taught(any_draft=0.0, node=0.01, num_rows=2), Drafter(Speculation(always=True))
    for _ in range(3 * PROBE_EVERY):
        trees = choose(choice, {0: (always, chain(0.9)), 1: (Drafter(), chain(0.9))}, 2)
        learn(choice, plan(2, 2), 1.02, is_forced=True)

        assert len(trees) == 2


def test_heads_that_bring_less_than_they_cost_are_asked_again_only_later() -> None:
    choice, drafter = DraftChoice(), Drafter()
    for _ in range(40):
        learn(choice, plan(1, with_heads=1), 1.5)
        learn(choice, plan(1), 1.0)
    for position in range(40):
        drafter.take_candidates(position, HeadCandidates(1, pack_ints([1]), pack_floats([0.1])))

    asked = [num_asked(choice, drafter, "v", 1) > 0 for _ in range(2 * PROBE_EVERY + 2)]

    assert asked == [False] * PROBE_EVERY + [True] + [False] * PROBE_EVERY + [True]


def test_of_all_that_have_heads_one_is_asked_again_in_as_many_steps() -> None:
    choice, drafters = DraftChoice(), [Drafter() for _ in range(16)]
    for _ in range(40):
        learn(choice, plan(16, with_heads=1), 1.5)
        learn(choice, plan(16), 1.0)

    asked = [sum(num_asked(choice, one, "v", 16) > 0 for one in drafters) for _ in range(3 * PROBE_EVERY + 3)]

    assert sum(asked) == 3
    assert max(asked) == 1


@pytest.mark.parametrize(("likelihood", "is_asked"), [(0.22, False), (0.27, True)])
def test_heads_are_asked_where_they_clearly_bring_more_than_they_cost(likelihood: float, is_asked: bool) -> None:
    choice, drafter = DraftChoice(), Drafter()
    for _ in range(40):
        for nodes, heads in ((0, 1), (0, 0), (2, 0), (8, 0)):
            learn(choice, plan(1, nodes, heads), 1.0 + 0.2 * heads, num_accepted=nodes + heads)
    for position in range(200):
        drafter.take_candidates(position, HeadCandidates(1, pack_ints([1]), pack_floats([likelihood])))

    assert (num_asked(choice, drafter, "v", 1) > 0) is is_asked


def test_heads_are_asked_once_a_plain_step_was_measured() -> None:
    choice, drafter = DraftChoice(), Drafter()

    assert num_asked(choice, drafter, "v", 1) == 0
    learn(choice, plan(1), 1.0)
    assert num_asked(choice, drafter, "v", 1) > 0


def test_what_heads_were_good_for_is_known_of_the_next_sequence_with_them() -> None:
    choice, drafter = DraftChoice(), Drafter()
    learn(choice, plan(1), 1.0)
    drafter.take_candidates(1, HeadCandidates(1, pack_ints([1]), pack_floats([0.01])))
    num_asked(choice, drafter, "poor", 1)

    assert num_asked(choice, Drafter(), "poor", 1) == 0
    assert num_asked(choice, Drafter(), "unknown", 1) > 0


def test_a_step_with_heads_is_no_plain_one() -> None:
    choice = taught(any_draft=0.0, node=0.01)
    for _ in range(PROBE_EVERY):
        learn(choice, plan(1, with_heads=1), 1.1)

    assert chosen(choice, 1, chain(0.9)) == {}
    assert num_asked(choice, Drafter(), "v", 1) == 0


def test_heads_are_never_asked_where_nobody_wants_them() -> None:
    assert num_asked(DraftChoice(), Drafter(Speculation(heads=False, always=True)), "v", 1) == 0


def steps(behavior: object, node: float, speculates: bool = True) -> tuple[list[int], int]:
    """What four sequences say, and the steps it takes, where a node costs so much of a plain step."""

    def seconds(plan: StepPlan) -> float:
        return 1.0 + node * sum(len(row.draft.token_ids) // 4 for row in plan.rows if row.draft)

    limits = msgspec.structs.replace(LIMITS, max_draft_nodes=16)
    loop = Loop(FakeEngine(limits, behavior, seconds=seconds), max_num_batched_tokens=256)  # type: ignore[arg-type]
    sequences = [
        loop.submit([5, 6, 7, seed], seed=seed, max_tokens=40, drafter=Drafter() if speculates else None)[0]
        for seed in range(4)
    ]
    loop.run()
    return [token for one in sequences for token in one.output_ids], len(loop.engine.plans)


def test_text_that_repeats_is_drafted_where_nodes_are_cheap_and_not_where_they_are_dear() -> None:
    plain = steps(echo, 0.0, speculates=False)
    cheap, dear = steps(echo, 0.01), steps(echo, 2.0)

    assert cheap[0] == dear[0] == plain[0]
    assert cheap[1] < 0.6 * plain[1]
    assert dear[1] >= 0.9 * plain[1]


def test_text_that_never_repeats_is_not_drafted() -> None:
    assert steps(hash_history, 0.01)[1] == steps(hash_history, 0.01, speculates=False)[1]


def test_guesses_that_turn_out_to_be_a_loss_are_left_until_they_promise_more() -> None:
    choice, drafter = taught(any_draft=0.0, node=0.1), Drafter()
    num_tried = 0
    while choose(choice, {0: (drafter, chain(0.2))}, 1) and num_tried < 200:  # a little more than a node costs
        learn(choice, plan(1, 1), 1.1)  # and never true
        learn(choice, plan(1), 1.0)
        num_tried += 1

    assert STEPS <= num_tried < 200
    assert chosen(choice, 1, chain(0.9)) == {0: 1}


def test_after_many_plain_steps_what_was_a_loss_is_doubted_less() -> None:
    choice = taught(any_draft=0.0, node=0.5)
    for _ in range(2 * STEPS):
        learn(choice, plan(1, 1), 1.5)  # never true
        learn(choice, plan(1), 1.0)
    assert least(choice, 1) == pytest.approx(0.5 * RAISED, rel=0.1)
    for _ in range(PROBE_EVERY):
        learn(choice, plan(1), 1.0)

    assert chosen(choice, 1, chain(0.4)) == {0: 1}  # a probe, for it is not worth it
    assert least(choice, 1) == pytest.approx(0.5, rel=0.1)


def test_what_pays_at_one_load_is_not_doubted_for_another() -> None:
    choice = taught(any_draft=0.0, node=0.02)
    for _ in range(8 * STEPS):
        learn(choice, plan(8, 1), 1.02)  # never true
        learn(choice, plan(8), 1.0)

    assert chosen(choice, 8, chain(0.5)) == {}
    assert chosen(choice, 1, chain(0.15)) == {0: 1}


def test_doubts_fade_over_plain_steps_though_nothing_is_tried() -> None:
    choice = taught(any_draft=0.0, node=0.1)
    for _ in range(2 * STEPS):
        learn(choice, plan(1, 1), 1.1)  # never true
        learn(choice, plan(1), 1.0)
    assert least(choice, 1) == pytest.approx(0.1 * RAISED, rel=0.1)

    for _ in range(LOWER_EVERY):
        learn(choice, plan(1), 1.0)

    assert least(choice, 1) == pytest.approx(0.1, rel=0.1)
