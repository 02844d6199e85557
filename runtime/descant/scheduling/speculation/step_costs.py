"""`StepCosts`: durations of steps, learned from steps that only decoded.

Plain steps are averaged by their number of rows. The additional time of verifying is fitted to the steps that verified,
by least squares in which older steps weigh less. It has three terms: one for having any draft, one per node of a draft,
and one for running draft heads, which mostly read their weights. So the model fits any machine, a CPU too, and follows
changes in its other load.
"""

from __future__ import annotations

from typing import NamedTuple

from descant.contract.plan import StepPlan, num_drafted

_NEW_SHARE = 0.2  # weight of a new measurement in the average of plain steps
_KEPT = 0.97  # share of the weight of earlier steps that is kept with each new one
_KEPT_OVER_PLAIN = 0.99  # the same with each plain step, so that old measurements fade
_PRIOR_WEIGHT = 0.05  # weight of the costs assumed before anything is measured, in steps
_PRIOR = (0.05, 0.05, 0.2)  # shares of a plain step: any draft, a node, any draft heads
_OTHERS = ((1, 2), (2, 0), (0, 1))  # for each of the three costs, the other two
_ROUNDS = 4  # of the solver with each step; it begins at its last result
# Least of the three. Heads mostly run together with drafts, so steps hardly tell the two apart; neither is free.
_LEAST = (0.02, 0.0, 0.1)
_NEARLY = 0.125  # difference between similar numbers of rows, relative
_SURELY_LESS = 0.8  # of a plain step: a step that did more in less time proves the average wrong
_MOST = 10.0  # plain steps: a longer step was delayed by something else


class AddedCosts(NamedTuple):
    """What speculation adds to the duration of a plain step, in plain steps."""

    any_draft: float  # that there is any draft at all
    node: float  # each node of a draft
    heads: float  # that draft heads run for any row

    def times(self, factor: float) -> AddedCosts:
        """Return the costs multiplied by a factor."""
        return AddedCosts(factor * self.any_draft, factor * self.node, factor * self.heads)


class StepCosts:
    """Durations of decode steps. Nothing is known until a plain one was measured."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # by number of rows
        self._products = [[0.0] * 3 for _ in range(3)]  # sums of products of the terms of steps
        self._targets = [0.0] * 3  # and of the terms with the time beyond a plain step
        self.added = AddedCosts(*_PRIOR)

    def learn(self, plan: StepPlan, seconds: float) -> bool:
        """Take a step into account if it only decoded; return whether it did."""
        if seconds <= 0 or plan.admit or any(row.num_new_tokens > 1 for row in plan.rows):
            return False
        num_rows = len(plan.rows)
        num_nodes = sum(map(num_drafted, plan.rows))
        has_heads = any(row.num_candidates for row in plan.rows)
        if not num_nodes and not has_heads:
            self._average(num_rows, seconds)
        elif (known := self._nearest(num_rows)) is not None:
            if seconds < _SURELY_LESS * self._plain[known]:  # it did more, so the plain steps had been delayed
                self._average(known, seconds)
            else:
                added = min(seconds / self._plain[known], _MOST) - 1.0
                self._fit((float(num_nodes > 0), float(num_nodes), float(has_heads)), added)
        return True

    def plain(self, num_rows: int) -> float | None:
        """Return the seconds of a plain step of about `num_rows` rows; None if none was measured."""
        known = self._nearest(num_rows)
        return None if known is None else self._plain[known]

    def _nearest(self, num_rows: int) -> int | None:
        if num_rows in self._plain:
            return num_rows
        nearest = min(self._plain, key=lambda known: abs(known - num_rows), default=None)
        return nearest if nearest is not None and abs(nearest - num_rows) <= num_rows * _NEARLY else None

    def _average(self, num_rows: int, seconds: float) -> None:
        known = self._plain.get(num_rows, seconds)
        self._plain[num_rows] = known + _NEW_SHARE * (min(seconds, _MOST * known) - known)
        self._fit((0.0, 0.0, 0.0), 0.0, _KEPT_OVER_PLAIN)

    def _fit(self, had: tuple[float, float, float], added: float, kept: float = _KEPT) -> None:
        for i, one in enumerate(had):
            self._targets[i] = kept * self._targets[i] + one * added
            for j, other in enumerate(had):
                self._products[i][j] = kept * self._products[i][j] + one * other
        self.added = self._solved()

    def _solved(self) -> AddedCosts:
        """Return the least-squares costs, none below `_LEAST`, by coordinate descent from the last result."""
        found, weight = list(self.added), _PRIOR_WEIGHT
        for _ in range(_ROUNDS):
            for i, (row, (j, k)) in enumerate(zip(self._products, _OTHERS, strict=True)):
                others = row[j] * found[j] + row[k] * found[k]  # written out, as it is done with every step
                one = (self._targets[i] + weight * _PRIOR[i] - others) / (row[i] + weight)
                found[i] = one if one > _LEAST[i] else _LEAST[i]
        return AddedCosts(*found)
