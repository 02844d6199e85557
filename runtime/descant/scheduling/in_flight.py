"""`InFlight`: the steps that are planned and not yet applied, the oldest first.

The next step is planned as if each of their rows succeeds and goes on: a sequence is then at `num_planned` positions
and has `num_pending` tokens more than are known. A sequence that finishes or is parked meanwhile keeps its blocks, its
adapter, its seat and its row until its last step is applied; the result of that step is ignored for it.
"""

from __future__ import annotations

from collections import deque

from descant.contract.plan import StepPlan, StepResult
from descant.scheduling.rows import PlannedStep
from descant.scheduling.sequence import Sequence
from descant_client.errors import InternalError


class InFlight:
    """The steps that the executor may be working on."""

    def __init__(self) -> None:
        self._steps: deque[PlannedStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences of all steps, each once."""
        return list({sequence.id: sequence for step in self._steps for sequence in step.sequences}.values())

    def has_sequence(self, sequence: Sequence) -> bool:
        """Return whether the sequence is in one of the steps."""
        return bool(self._steps) and sequence.device.last_step >= self._steps[0].plan.step

    def has_step(self, planned: PlannedStep) -> bool:
        """Return whether the step is in flight."""
        return any(step is planned for step in self._steps)

    def add(self, planned: PlannedStep) -> None:
        """Register a planned step as in flight and advance its sequences. Call it before the plan is sent."""
        self._steps.append(planned)
        number = planned.plan.step
        for sequence, row in zip(planned.sequences, planned.plan.rows, strict=True):
            device = sequence.device
            device.last_step = number
            device.num_planned += row.num_new_tokens
            num_tokens = sequence.num_prompt_tokens + len(sequence.output.token_ids) + device.num_pending
            if device.num_planned == num_tokens:
                device.num_pending += 1

    def complete(self, planned: PlannedStep, result: StepResult) -> None:
        """Remove the oldest step, which is done.

        Raises:
            InternalError: the result answers another plan.
        """
        assert self._steps[0] is planned, "steps are done in order"
        _check_answers(planned.plan, result)
        self._steps.popleft()

    def clear(self) -> None:
        """Forget all steps: their executor is gone."""
        self._steps.clear()


def _check_answers(plan: StepPlan, result: StepResult) -> None:
    if result.step != plan.step or [row.row for row in result.rows] != [row.row for row in plan.rows]:
        raise InternalError("the executor answered another step than the one it was given")
