"""`DraftChoice`: chooses the nodes of guesses that a step verifies.

All rows of a step wait for its end. A node pays if the tokens it brings outweigh the time it costs all rows. Whether
it does depends on the load: with many rows, or on a device that is busy computing anyway, a node costs more. The
likeliest nodes are taken, whichever sequence they belong to, up to the number at which the step yields most tokens
per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from descant.contract.plan import StepPlan, StepResult, num_drafted
from descant.scheduling.speculation.doubt import Doubt, gain_of
from descant.scheduling.speculation.drafting import Drafter
from descant.scheduling.speculation.guess import Guess, discounted, pruned
from descant.scheduling.speculation.ngram import DraftTree
from descant.scheduling.speculation.step_costs import AddedCosts, StepCosts

MARGIN = 1.05  # factor by which the estimated speed with drafts must exceed that without
PROBE_EVERY = 64  # steps without a draft, or without a plain step: then the other is measured again
MAX_PROBE_EVERY = 1024  # while one probe after the other finds that drafts do not pay
PROBE_NODES = 4
MAX_VERSIONS = 1024  # with heads that are remembered
PROBE_LEAST = 0.3  # likelihood of a node that a probe verifies


class _HeadsRecord:
    """Statistics of the draft heads of one version."""

    def __init__(self) -> None:
        self.likelihoods: list[float] = []  # `Drafter.head_likelihoods` of the drafter seen last
        self.num_unasked = 0  # consecutive rows that the heads were not run for


class _HeadsRecords:
    """The records of the versions seen last, at most `MAX_VERSIONS`."""

    def __init__(self) -> None:
        self._by_digest: dict[str, _HeadsRecord] = {}  # the latest last

    def of(self, digest: str) -> _HeadsRecord:
        """Return the record of a version; a new one if there is none."""
        record = self._by_digest[digest] = self._by_digest.pop(digest, None) or _HeadsRecord()
        while len(self._by_digest) > MAX_VERSIONS:
            del self._by_digest[next(iter(self._by_digest))]
        return record


class _Load:
    """Statistics of steps of similar numbers of rows: up to twice as many as the least of them."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.doubt = Doubt()
        self.num_undrafted = 0  # consecutive decode steps without a draft
        self.num_guessing = 0  # consecutive ones with a draft or with heads
        self._probe_every = PROBE_EVERY

    @property
    def is_probe_due(self) -> bool:
        """Whether there was no draft for so long that one is to be verified as a measurement."""
        return self.num_undrafted >= self._probe_every

    def on_chosen(self) -> None:
        """Record that drafts were chosen because they pay."""
        self._probe_every = PROBE_EVERY

    def on_probe(self) -> None:
        """Record that a draft is verified as a measurement only; the next such probe waits longer."""
        self._probe_every = min(2 * self._probe_every, MAX_PROBE_EVERY)
        self.doubt.lower()


class DraftChoice:
    """Learns from steps what verifying costs on this machine, and makes the choice of each step from that."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}  # by the bits of the number of rows
        self._heads = _HeadsRecords()

    def learn(self, plan: StepPlan, result: StepResult, seconds: float, *, is_forced: bool = False) -> None:
        """Learn from the duration of a step.

        Args:
          is_forced: a sequence in it verifies at any cost, so the step could not be plain.
        """
        load = self._load_of(len(plan.rows))
        if not load.costs.learn(plan, seconds) or is_forced:
            return
        has_draft = any(map(num_drafted, plan.rows))
        is_plain = not has_draft and not any(row.num_candidates for row in plan.rows)
        plain_seconds = load.costs.plain(len(plan.rows))
        if is_plain:
            load.doubt.on_plain_step()
        elif plain_seconds is not None:
            load.doubt.on_gain(gain_of(plan, result, seconds, plain_seconds))
        load.num_undrafted = 0 if has_draft else load.num_undrafted + 1
        load.num_guessing = 0 if is_plain else load.num_guessing + 1

    def for_step(self, num_rows: int, *, is_forced: bool) -> StepChoice:
        """Return the choice for a step of `num_rows` decoding rows. `is_forced` as for `learn`."""
        load = self._load_of(num_rows)
        is_unknown = load.costs.plain(num_rows) is None or load.num_guessing >= PROBE_EVERY
        added = load.costs.added.times(load.doubt.factor)
        return StepChoice(num_rows, added, is_unknown and not is_forced, load.is_probe_due, load, self._heads)

    def _load_of(self, num_rows: int) -> _Load:
        bits = num_rows.bit_length()
        if bits not in self._loads:
            self._loads[bits] = _Load()
        return self._loads[bits]


@dataclass(frozen=True, slots=True)
class StepChoice:
    """Chooses for one step, by the costs known when its planning began."""

    _num_rows: int
    _added: AddedCosts  # to a plain step, doubt included
    _is_plain_due: bool  # the step shall measure a plain one
    _is_probe_due: bool
    _load: _Load
    _heads: _HeadsRecords

    @property
    def least_likelihood(self) -> float:
        """Likelihood that a node must have, at least, for the step to verify it."""
        if self._is_plain_due:
            return math.inf
        dearest = PROBE_LEAST if self._is_probe_due else math.inf
        return min(dearest, self._added.node * self._num_rows)  # in tokens that all rows lose meanwhile

    def choose(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> dict[int, DraftTree]:
        """Return the trees to verify in the step, by sequence."""
        weighed = {
            key: (drafter, discounted(guess, drafter.acceptance_share))
            for key, (drafter, guess) in guesses.items()
            if not drafter.settings.always
        }
        least = math.inf if self._is_plain_due or not weighed else self._least_chosen(weighed)
        chosen = {key: guess.tree for key, (_, guess) in guesses.items() if key not in weighed}
        for key, (drafter, guess) in weighed.items():
            worthy = pruned(guess, least, len(guess.probabilities))
            if worthy is not None:
                chosen[key] = worthy.tree
                drafter.expect(sum(worthy.probabilities) / drafter.acceptance_share)
        if not chosen:
            return self._probe(weighed)
        self._load.on_chosen()
        return chosen

    def num_candidates(self, drafter: Drafter, digest: str) -> int:
        """Return how many tokens each draft head of a sequence is to propose after the step; 0: heads need not run.

        The usefulness of heads in one sequence is assumed for the next; `digest` is that of their version.
        """
        settings = drafter.settings
        if not settings.heads or (self._is_plain_due and not settings.always):
            return 0
        record = self._heads.of(digest)
        record.likelihoods = drafter.share_head_likelihoods(record.likelihoods)
        # In tokens: drafts and heads delay all rows, for the benefit of all rows that have some.
        gain = drafter.heads_gain(self._added.node * self._num_rows) - self._added.any_draft - self._added.heads
        is_probe_due = record.num_unasked >= PROBE_EVERY * self._num_rows  # of one row then, in as many steps
        if settings.always or gain > MARGIN - 1.0 or is_probe_due:
            record.num_unasked = 0
            return settings.num_candidates
        record.num_unasked += 1
        return 0

    def _least_chosen(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> float:
        """Return the likelihood of the last node that makes the step better; infinity if none does."""
        num_rows, added = self._num_rows, self._added
        likelihoods = [one for _, guess in guesses.values() for one in guess.probabilities]
        best, least, gain = num_rows * MARGIN, math.inf, 0.0
        for count, likelihood in enumerate(sorted(likelihoods, reverse=True), start=1):
            gain += likelihood
            rate = (num_rows + gain) / (1.0 + added.any_draft + added.node * count)
            if rate > best:
                best, least = rate, likelihood
        return least

    def _probe(self, guesses: Mapping[int, tuple[Drafter, Guess]]) -> dict[int, DraftTree]:
        """Return the likeliest nodes of the guess with the likeliest node, by sequence, if a probe is due."""
        if not self._is_probe_due or self._is_plain_due or not guesses:
            return {}
        key, (drafter, guess) = max(guesses.items(), key=lambda one: max(one[1][1].probabilities))
        probe = pruned(guess, PROBE_LEAST, PROBE_NODES)
        if probe is None:
            return {}
        drafter.expect(sum(probe.probabilities) / drafter.acceptance_share)
        self._load.on_probe()
        return {key: probe.tree}
