"""`Doubt`: a factor on the estimated costs of guessing, raised while guessing does not pay.

The costs of steps and the rates of acceptance are estimates. Where gain and cost balance, choosing by estimates loses a
little, because the best-looking choice tends to be overestimated. So the actual gain of guessing is measured too.
"""

from __future__ import annotations

from descant.contract.plan import StepPlan, StepResult, num_packed

STEPS = 16  # with guesses that are judged together
RAISED = 1.5  # factor by which a loss raises it
MOST = 16.0  # largest factor
CLEAR_GAIN = 0.05  # of a plain step, per step
CLEAR_LOSS = -0.02  # likewise: less may be chance
LOWER_EVERY = 256  # plain steps, after which the factor is lowered


class Doubt:
    """The doubt about steps of similar numbers of rows. Costs are to be multiplied by `factor`, which is 1 at least."""

    def __init__(self) -> None:
        self.factor = 1.0
        self._num_steps = 0
        self._gain = 0.0
        self._num_plain = 0

    def on_gain(self, gain: float) -> None:
        """Record the net gain of a step with guesses, in plain steps. It is negative if guessing lost time."""
        self._num_steps += 1
        self._gain += gain
        if self._num_steps == STEPS:
            if self._gain < CLEAR_LOSS * STEPS:
                self.factor = min(MOST, self.factor * RAISED)
            elif self._gain > CLEAR_GAIN * STEPS:
                self.lower()
            self._num_steps, self._gain = 0, 0.0

    def on_plain_step(self) -> None:
        """Record a plain step."""
        self._num_plain += 1
        if self._num_plain == LOWER_EVERY:
            self._num_plain = 0
            self.lower()

    def lower(self) -> None:
        """Lower the factor by one step, so that guessing is tried again."""
        self.factor = max(1.0, self.factor / RAISED)


def gain_of(plan: StepPlan, result: StepResult, seconds: float, plain_seconds: float) -> float:
    """Return the net gain of a decode step: its tokens per row, less its duration in plain steps."""
    num_tokens = sum(num_packed(row.token_ids) for row in result.rows)
    return num_tokens / len(plan.rows) - seconds / plain_seconds
