"""`Doubt`: whether guessing has paid, and how much dearer it is taken to be while it does not.

What steps cost and how often guesses come true are estimates, and where they balance, choosing by them loses a little:
what looks best is what was estimated too high. So it is kept in account what guessing brought and what it took.
"""

from __future__ import annotations

from descant.contract.plan import StepPlan, StepResult, num_packed

STEPS = 16  # that guessed: so many are judged together
RAISED = 1.5  # by so much, after a loss
MOST = 16.0
CLEAR_GAIN = 0.05  # of a plain step, per step
CLEAR_LOSS = -0.02  # likewise: less may be chance
RELENT_EVERY = 256  # plain steps


class Doubt:
    """For steps of about one number of rows: `factor` is what costs are to be multiplied by, 1 at least."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._num_steps = 0
        self._gain = 0.0
        self._num_plain = 0

    def on_gain(self, gain: float) -> None:
        """Guessing brought so many plain steps more, in one step, than it took; less than 0: it was a loss."""
        self._num_steps += 1
        self._gain += gain
        if self._num_steps == STEPS:
            if self._gain < CLEAR_LOSS * STEPS:
                self.factor = min(MOST, self.factor * RAISED)
            elif self._gain > CLEAR_GAIN * STEPS:
                self.relent()
            self._num_steps, self._gain = 0, 0.0

    def on_plain_step(self) -> None:
        """A plain step has passed."""
        self._num_plain += 1
        if self._num_plain == RELENT_EVERY:
            self._num_plain = 0
            self.relent()

    def relent(self) -> None:
        """Give guessing another chance."""
        self.factor = max(1.0, self.factor / RAISED)


def gain_of(plan: StepPlan, result: StepResult, seconds: float, plain_seconds: float) -> float:
    """Return how many plain steps a decode step was worth by its tokens, less those it took the time of."""
    num_tokens = sum(num_packed(row.token_ids) for row in result.rows)
    return num_tokens / len(plan.rows) - seconds / plain_seconds
