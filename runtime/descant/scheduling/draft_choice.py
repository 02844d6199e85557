"""`DraftChoice`: which of the guesses of a step are worth verifying.

All rows of a step wait for its end. So a node pays if what it brings, in tokens, outweighs what it takes from
everybody, and whether it does depends on the load: many rows, or a device that has computing to do anyway, make it
dearer. The likeliest nodes are taken, of whatever sequence, as many as make the step's tokens per second highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from descant.scheduling.drafting import NUM_CANDIDATES, Drafter
from descant.scheduling.guess import Guess, pruned
from descant.scheduling.ngram import DraftTree
from descant.scheduling.plan import StepPlan, num_drafted
from descant.scheduling.step_costs import StepCosts

MARGIN = 1.02  # by which verifying must promise to be faster
PROBE_EVERY = 64  # steps without a draft, or without a plain step: then the other is measured again
PROBE_NODES = 4
PROBE_LEAST = 0.3  # likelihood of a node that a probe verifies


class DraftChoice:
    """Chooses, and learns from steps what verifying costs on this machine."""

    def __init__(self) -> None:
        self._costs = StepCosts()
        self._num_undrafted = 0  # decode steps in a row without a draft
        self._num_guessing = 0  # with one, or with heads

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """Take note of what a step took."""
        if not self._costs.learn(plan, seconds):
            return
        has_draft = any(map(num_drafted, plan.rows))
        is_plain = not has_draft and not any(row.num_candidates for row in plan.rows)
        self._num_undrafted = 0 if has_draft else self._num_undrafted + 1
        self._num_guessing = 0 if is_plain else self._num_guessing + 1

    def least_likelihood(self, num_rows: int) -> float:
        """Return how likely a node must be, at least, for a step of so many rows to verify it."""
        if self._is_plain_due(num_rows):
            return math.inf
        dearest = PROBE_LEAST if self._num_undrafted >= PROBE_EVERY else math.inf
        return min(dearest, self._costs.added[1] * num_rows)  # in tokens that all rows go without meanwhile

    def choose(self, guesses: Mapping[int, tuple[Drafter, Guess]], num_rows: int) -> dict[int, DraftTree]:
        """Return what to verify in a step of so many rows, by sequence."""
        weighed = {key: guess for key, (drafter, guess) in guesses.items() if not drafter.settings.always}
        chosen = self._weigh(weighed, num_rows) if weighed else {}
        for key, (drafter, guess) in guesses.items():
            if drafter.settings.always:
                chosen[key] = guess.tree
        return chosen

    def num_candidates(self, drafter: Drafter, num_rows: int) -> int:
        """Return how many tokens each draft head of a sequence is to propose after this step; 0: they need not run."""
        if not drafter.settings.heads or (self._is_plain_due(num_rows) and not drafter.settings.always):
            return 0
        price = self._costs.added[2] * num_rows  # in tokens, likewise
        if drafter.settings.always or drafter.heads_gain > price or drafter.num_unasked >= PROBE_EVERY:
            drafter.num_unasked = 0
            return max(1, min(NUM_CANDIDATES, drafter.settings.max_width))
        drafter.num_unasked += 1
        return 0

    def _is_plain_due(self, num_rows: int) -> bool:
        return self._costs.plain(num_rows) is None or self._num_guessing >= PROBE_EVERY

    def _weigh(self, guesses: Mapping[int, Guess], num_rows: int) -> dict[int, DraftTree]:
        if math.isinf(self.least_likelihood(num_rows)):
            return {}
        least = self._least_chosen(guesses, num_rows)
        if math.isinf(least) and self._num_undrafted >= PROBE_EVERY:
            key, guess = max(guesses.items(), key=lambda one: one[1].probabilities[0])
            probe = pruned(guess, PROBE_LEAST, PROBE_NODES)
            return {} if probe is None else {key: probe}
        trees = {key: pruned(guess, least, len(guess.probabilities)) for key, guess in guesses.items()}
        return {key: tree for key, tree in trees.items() if tree is not None}

    def _least_chosen(self, guesses: Mapping[int, Guess], num_rows: int) -> float:
        """Return the likelihood of the last node that makes the step better; infinity: none does."""
        any_draft, node, _ = self._costs.added
        best, least, gain = num_rows * MARGIN, math.inf, 0.0
        for count, likelihood in enumerate(sorted(_all(guesses), reverse=True), start=1):
            gain += likelihood
            rate = (num_rows + gain) / (1.0 + any_draft + node * count)
            if rate > best:
                best, least = rate, likelihood
        return least


def _all(guesses: Mapping[int, Guess]) -> list[float]:
    return [likelihood for guess in guesses.values() for likelihood in guess.probabilities]
