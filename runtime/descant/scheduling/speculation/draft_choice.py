"""`DraftChoice`: which of the guesses of a step are worth verifying.

All rows of a step wait for its end. So a node pays if what it brings, in tokens, outweighs what it takes from
everybody, and whether it does depends on the load: many rows, or a device that has computing to do anyway, make it
dearer. The likeliest nodes are taken, of whatever sequence, as many as make the step's tokens per second highest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from descant.contract.plan import StepPlan, StepResult, num_drafted
from descant.scheduling.speculation.doubt import Doubt, gain_of
from descant.scheduling.speculation.drafting import Drafter
from descant.scheduling.speculation.guess import Guess, believed, pruned
from descant.scheduling.speculation.ngram import DraftTree
from descant.scheduling.speculation.step_costs import StepCosts

MARGIN = 1.05  # by which verifying must promise to be faster
PROBE_EVERY = 64  # steps without a draft, or without a plain step: then the other is measured again
MAX_PROBE_EVERY = 1024  # while one probe after the other finds that drafts do not pay
PROBE_NODES = 4
MAX_VERSIONS = 1024  # whose heads are remembered
PROBE_LEAST = 0.3  # likelihood of a node that a probe verifies


class _Heads:
    """What is known of the draft heads of a version."""

    def __init__(self) -> None:
        self.odds: list[float] = []  # `Drafter.odds` of late
        self.num_unasked = 0  # rows in a row that they were not run for


class _Load:
    """What is known of steps of about one number of rows: up to twice as many as the least of them."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.doubt = Doubt()
        self.probe_every = PROBE_EVERY
        self.num_undrafted = 0  # decode steps in a row without a draft
        self.num_guessing = 0  # with one, or with heads


class DraftChoice:
    """Chooses, and learns from steps what verifying costs on this machine."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}  # by the bits of the number of rows
        self._heads: dict[str, _Heads] = {}  # by version, the latest last
        self.begin(1, is_forced=False)

    def learn(self, plan: StepPlan, result: StepResult, seconds: float, *, is_forced: bool = False) -> None:
        """Take note of what a step took. `is_forced`: somebody in it verifies at any cost, so it could not be plain."""
        load = self._load_of(len(plan.rows))
        if not load.costs.learn(plan, seconds) or is_forced:
            return
        has_draft = any(map(num_drafted, plan.rows))
        is_plain = not has_draft and not any(row.num_candidates for row in plan.rows)
        plain_seconds = load.costs.plain(len(plan.rows))
        if is_plain:
            load.doubt.saw_plain()
        elif plain_seconds is not None:
            load.doubt.saw(gain_of(plan, result, seconds, plain_seconds))
        load.num_undrafted = 0 if has_draft else load.num_undrafted + 1
        load.num_guessing = 0 if is_plain else load.num_guessing + 1

    def begin(self, num_rows: int, *, is_forced: bool) -> None:
        """A step of so many rows is to be planned: what is asked next is of it. `is_forced` as for `learn`."""
        self._num_rows, self._load = num_rows, self._load_of(num_rows)
        factor, (any_draft, node, heads) = self._load.doubt.factor, self._load.costs.added
        self._added = factor * any_draft, factor * node, factor * heads  # what guessing is taken to add to the step
        is_unknown = self._load.costs.plain(num_rows) is None or self._load.num_guessing >= PROBE_EVERY
        self._is_plain_due = is_unknown and not is_forced

    @property
    def least_likelihood(self) -> float:
        """How likely a node must be, at least, for the step to verify it."""
        if self._is_plain_due:
            return math.inf
        dearest = PROBE_LEAST if self._is_probe_due else math.inf
        return min(dearest, self._added[1] * self._num_rows)  # in tokens that all rows go without meanwhile

    def choose(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> dict[int, DraftTree]:
        """Return what to verify in the step, by sequence."""
        weighed = {
            key: (drafter, believed(guess, drafter.kept_share))
            for key, (drafter, guess) in guesses.items()
            if not drafter.settings.always
        }
        least = math.inf if self._is_plain_due or not weighed else self._least_chosen(weighed)
        chosen = {key: guess.tree for key, (_, guess) in guesses.items() if key not in weighed}
        for key, (drafter, guess) in weighed.items():
            worthy = pruned(guess, least, len(guess.probabilities))
            if worthy is not None:
                chosen[key] = worthy.tree
                drafter.promise(sum(worthy.probabilities) / drafter.kept_share)
        if not chosen:
            return self._probe(weighed)
        self._load.probe_every = PROBE_EVERY
        return chosen

    def num_candidates(self, drafter: Drafter, digest: str) -> int:
        """Return how many tokens each draft head of a sequence is to propose after the step; 0: they need not run.

        What heads were good for in one sequence is what they are taken for in the next; `digest` is their version's.
        """
        if not drafter.settings.heads or (self._is_plain_due and not drafter.settings.always):
            return 0
        known = self._heads[digest] = self._heads.pop(digest, None) or _Heads()
        while len(self._heads) > MAX_VERSIONS:
            del self._heads[next(iter(self._heads))]
        if drafter.odds:
            known.odds = drafter.odds
        else:
            drafter.odds = known.odds
        any_draft, node, heads = self._added
        # In tokens, likewise: that there are drafts and heads delays all rows, and is for all that have some.
        gain = drafter.heads_gain(node * self._num_rows) - any_draft - heads
        is_probe_due = known.num_unasked >= PROBE_EVERY * self._num_rows  # of one row then, in as many steps
        if drafter.settings.always or gain > MARGIN - 1.0 or is_probe_due:
            known.num_unasked = 0
            return drafter.settings.num_candidates
        known.num_unasked += 1
        return 0

    def _load_of(self, num_rows: int) -> _Load:
        bits = num_rows.bit_length()
        if bits not in self._loads:
            self._loads[bits] = _Load()
        return self._loads[bits]

    @property
    def _is_probe_due(self) -> bool:
        return self._load.num_undrafted >= self._load.probe_every

    def _least_chosen(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> float:
        """Return the likelihood of the last node that makes the step better; infinity: none does."""
        num_rows, (any_draft, node, _) = self._num_rows, self._added
        likelihoods = [one for _, guess in guesses.values() for one in guess.probabilities]
        best, least, gain = num_rows * MARGIN, math.inf, 0.0
        for count, likelihood in enumerate(sorted(likelihoods, reverse=True), start=1):
            gain += likelihood
            rate = (num_rows + gain) / (1.0 + any_draft + node * count)
            if rate > best:
                best, least = rate, likelihood
        return least

    def _probe(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> dict[int, DraftTree]:
        """Return a few nodes of the surest guess, if nothing was verified for long."""
        if not self._is_probe_due or self._is_plain_due or not guesses:
            return {}
        key, (drafter, guess) = max(guesses.items(), key=lambda one: max(one[1][1].probabilities))
        probe = pruned(guess, PROBE_LEAST, PROBE_NODES)
        if probe is None:
            return {}
        drafter.promise(sum(probe.probabilities) / drafter.kept_share)
        self._load.probe_every = min(2 * self._load.probe_every, MAX_PROBE_EVERY)
        self._load.doubt.relent()
        return {key: probe.tree}
