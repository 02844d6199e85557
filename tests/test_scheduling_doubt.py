"""What guessing costs is taken to be more while it does not pay."""

from __future__ import annotations

import pytest

from descant.contract.plan import Row, RowResult, StepPlan, StepResult, pack_ints
from descant.scheduling.speculation.doubt import LOWER_EVERY, MOST, RAISED, STEPS, Doubt, gain_of


def seen(doubt: Doubt, gain: float, times: int = 1) -> float:
    for _ in range(times * STEPS):
        doubt.on_gain(gain)
    return doubt.factor


def test_a_loss_raises_it_and_a_clear_gain_lowers_it_again() -> None:
    doubt = Doubt()

    assert seen(doubt, 0.2) == 1.0
    assert seen(doubt, -0.01) == 1.0  # too little to be sure of
    assert seen(doubt, -0.03) == RAISED
    assert seen(doubt, 0.01) == RAISED  # likewise
    assert seen(doubt, 0.2) == pytest.approx(1.0)


def test_one_step_that_was_held_up_is_no_loss() -> None:
    doubt = Doubt()
    for _ in range(4 * STEPS):
        doubt.on_gain(0.3)
    doubt.on_gain(-2.0)
    for _ in range(STEPS - 1):
        doubt.on_gain(0.3)

    assert doubt.factor == 1.0


def test_it_ends_somewhere_and_another_chance_is_a_step_back() -> None:
    doubt = Doubt()

    assert seen(doubt, -1.0, times=20) == MOST
    doubt.lower()
    assert doubt.factor == pytest.approx(MOST / RAISED)


def test_it_fades_over_plain_steps() -> None:
    doubt = Doubt()
    seen(doubt, -1.0, times=2)
    for _ in range(2 * LOWER_EVERY - 1):
        doubt.on_plain_step()
    assert doubt.factor == pytest.approx(RAISED)

    doubt.on_plain_step()
    assert doubt.factor == pytest.approx(1.0)


def test_a_step_gains_the_tokens_it_gave_beyond_one_to_each_row_less_the_time_it_took() -> None:
    plan = StepPlan(0, 0, rows=(Row(1, 1), Row(2, 1)))
    rows = (RowResult(1, 9, pack_ints([5, 6, 7])), RowResult(2, 9, pack_ints([8])))

    assert gain_of(plan, StepResult(0, 0, rows), seconds=0.03, plain_seconds=0.02) == pytest.approx(2.0 - 1.5)
