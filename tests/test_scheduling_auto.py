"""What `auto` comes to over many steps, on machines that exist only on paper: it follows what pays."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from decode_steps import chain
from descant.contract.plan import Row, RowResult, StepPlan, StepResult, TokenDraft, num_drafted, pack_ints
from descant.scheduling.speculation.draft_choice import DraftChoice
from descant.scheduling.speculation.drafting import Drafter
from descant_client.speculation import Speculation


class Machine:
    """A step takes 1 and `per_token` for each row and node. Every row guesses `depth` tokens, each believed to be right
    with a probability of `belief`; `truth` is how often they are."""

    def __init__(self, per_token: float, belief: float, truth: float, depth: int = 8) -> None:
        self.per_token, self.belief, self.truth, self.depth = per_token, belief, truth, depth
        self.slowness: Callable[[int], float] = lambda step: 1.0
        self.choice = DraftChoice()
        self.num_steps = 0
        self.seconds = self.plain_seconds = 0.0  # what was taken, and what as many tokens take without guesses
        self._dice = random.Random(1)

    def run(self, drafters: list[Drafter], num_steps: int) -> int:
        """Run steps of as many rows; return how many verified something of somebody who does not always."""
        return sum(self._step(drafters) for _ in range(num_steps))

    def _step(self, drafters: list[Drafter]) -> bool:
        is_forced = any(one.settings.always for one in drafters)
        choice = self.choice.for_step(len(drafters), is_forced=is_forced)
        guess = chain(*[self.belief ** (i + 1) for i in range(self.depth)])
        trees = choice.choose({i: (one, guess) for i, one in enumerate(drafters)})
        drafts = [trees.get(i) for i in range(len(drafters))]
        plan = StepPlan(0, 0, rows=tuple(Row(i, 1, draft=_draft(tree)) for i, tree in enumerate(drafts)))
        slowness = self.slowness(self.num_steps) * self._dice.uniform(0.97, 1.03)
        seconds = slowness * (1 + self.per_token * (len(drafters) + sum(map(num_drafted, plan.rows))))
        accepted = [self._accepted(num_drafted(row)) for row in plan.rows]
        for one, row, count in zip(drafters, plan.rows, accepted, strict=True):
            if num_drafted(row):
                one.learn(num_drafted(row), count)
        rows = tuple(RowResult(i, 1, pack_ints([0] * (1 + count))) for i, count in enumerate(accepted))
        self.choice.learn(plan, StepResult(0, 0, rows), seconds, is_forced=is_forced)
        self.num_steps += 1
        self.seconds += seconds
        plain = slowness * (1 + self.per_token * len(drafters))
        self.plain_seconds += plain * (len(drafters) + sum(accepted)) / len(drafters)
        return any(row.draft and not one.settings.always for one, row in zip(drafters, plan.rows, strict=True))

    def _accepted(self, num_nodes: int) -> int:
        count = 0
        while count < num_nodes and self._dice.random() < self.truth:
            count += 1
        return count


def _draft(tree: object) -> TokenDraft | None:
    if tree is None:
        return None
    token_ids, parents = tree  # type: ignore[misc]
    return TokenDraft(pack_ints(token_ids), pack_ints(parents))


def rows(count: int) -> list[Drafter]:
    return [Drafter() for _ in range(count)]


@pytest.mark.parametrize(("belief", "num_rows", "per_token"), [(0.6, 1, 0.1), (0.95, 8, 0.05), (0.7, 4, 0.05)])
@pytest.mark.parametrize("slowness", [2.0, 20.0])
def test_it_goes_on_guessing_soon_after_everything_was_slow_for_a_while(
    belief: float, num_rows: int, per_token: float, slowness: float
) -> None:
    machine, drafters = Machine(per_token, belief, belief), rows(num_rows)
    assert machine.run(drafters, 300) > 200
    machine.slowness = lambda step: slowness
    machine.run(drafters, 20)
    machine.slowness = lambda step: 1.0

    machine.run(drafters, 500)

    assert machine.run(drafters, 100) > 50


@pytest.mark.parametrize("per_token", [0.05, 0.2])
def test_what_it_learned_with_one_stream_is_not_held_against_many(per_token: float) -> None:
    machine = Machine(per_token, 0.95, 0.95, depth=16)
    machine.run(rows(1), 400)

    assert machine.run(rows(16), 100) > 50


@pytest.mark.parametrize(("longer", "num_rows", "per_token"), [(2, 1, 0.1), (5, 4, 0.02), (3, 2, 0.03)])
def test_it_pays_though_short_and_long_texts_take_turns(longer: int, num_rows: int, per_token: float) -> None:
    machine = Machine(per_token, 0.6, 0.6, depth=4)
    machine.slowness = lambda step: longer if step // 200 % 2 else 1.0

    for _ in range(40):
        machine.run(rows(num_rows), 200)

    assert machine.plain_seconds / machine.seconds > 1.25


@pytest.mark.parametrize(
    ("belief", "truth", "num_rows", "per_token"),
    [(0.6, 0.3, 1, 0.4), (0.4, 0.4, 1, 0.35), (0.9, 0.5, 16, 0.2), (0.5, 0.5, 4, 0.15), (0.9, 0.1, 4, 0.05)],
)
def test_it_costs_nearly_nothing_where_guessing_does_not_pay(
    belief: float, truth: float, num_rows: int, per_token: float
) -> None:
    machine, drafters = Machine(per_token, belief, truth), rows(num_rows)

    machine.run(drafters, 6000)

    assert machine.plain_seconds / machine.seconds > 0.985


@pytest.mark.parametrize("num_before", [0, 1, 60, 66, 70])
def test_somebody_who_always_verifies_keeps_nobody_from_guessing(num_before: int) -> None:
    machine, drafters = Machine(0.01, 0.9, 0.9), rows(3)
    machine.run(drafters, num_before)

    assert machine.run([*drafters, Drafter(Speculation(always=True))], 200) > 150
