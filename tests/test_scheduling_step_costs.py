"""What verifying adds to a step, learned from steps."""

from __future__ import annotations

import random

import pytest

from decode_steps import plan
from descant.contract.plan import Admit, Row, StepPlan, pack_ints
from descant.scheduling.speculation.step_costs import StepCosts
from descant_client.protocol import SamplingParams


def test_what_verifying_adds_is_found_under_noise() -> None:
    costs, dice = StepCosts(), random.Random(1)
    for _ in range(500):
        nodes, with_heads = dice.choice([0, 0, 1, 3, 8, 16]), dice.choice([0, 2])
        added = 0.1 * (nodes > 0) + 0.02 * nodes + 0.1 * (with_heads > 0)
        costs.learn(plan(4, nodes, with_heads), 0.01 * (1 + added) * dice.uniform(0.97, 1.03))

    assert costs.plain(4) == pytest.approx(0.01, rel=0.03)
    assert costs.added == pytest.approx((0.1, 0.02, 0.1), abs=0.02)


def test_a_step_that_was_held_up_counts_for_no_more_than_ten_plain_ones() -> None:
    costs = StepCosts()
    costs.learn(plan(1), 0.01)
    costs.learn(plan(1, nodes=1), 100.0)

    assert sum(costs.added[:2]) < 10.0


def test_a_plain_step_that_was_held_up_is_found_out_by_those_that_verify() -> None:
    costs = StepCosts()
    costs.learn(plan(1), 1.0)  # the first of its kind: ten times what it takes
    for _ in range(20):
        costs.learn(plan(1, nodes=2), 0.12)

    assert costs.plain(1) == pytest.approx(0.13, abs=0.03)
    assert sum(costs.added[:2]) < 0.2


def test_steps_that_do_more_than_decode_teach_nothing() -> None:
    costs = StepCosts()
    admit = Admit(0, pack_ints([1]), 1, 0, pack_ints([0]), SamplingParams(), 0)

    costs.learn(StepPlan(0, 0, admit=(admit,), rows=(Row(0, 1),)), 1.0)
    costs.learn(StepPlan(0, 0, rows=(Row(0, 1), Row(1, 7))), 1.0)
    costs.learn(plan(1), 0.0)

    assert costs.plain(1) is None


def test_a_number_of_rows_never_seen_is_taken_for_one_near_by() -> None:
    costs = StepCosts()
    costs.learn(plan(2), 1.0)
    assert costs.plain(15) is None
    costs.learn(plan(16), 3.0)

    assert (costs.plain(3), costs.plain(15), costs.plain(17), costs.plain(19)) == (None, 3.0, 3.0, None)


def test_neither_drafts_nor_heads_are_ever_taken_to_be_for_nothing() -> None:
    costs = StepCosts()
    for _ in range(100):
        costs.learn(plan(4), 1.0)
        costs.learn(plan(4, nodes=4, with_heads=4), 1.0)

    any_draft, _, heads = costs.added
    assert any_draft >= 0.02
    assert heads >= 0.1
