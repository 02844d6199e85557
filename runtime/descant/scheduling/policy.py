"""`Policy`: decides which sequences run in the next step, and takes over a step's result. It never waits.

The scheduler actor repeats this, and passes on messages in between:

    planned = policy.plan()                    # None: nothing can run now
    work = policy.adapters.take_work()         # moves first; loads may take as long as they like
    for load in work.loads:
        ...                                    # then policy.adapters.on_placed(load) or on_load_failed(load, error)
    result = ...                               # run planned.plan on the engine
    policy.apply(planned, result)              # or policy.on_executor_lost(reason), later policy.on_executor_up(...)

An executor may allow further steps to be planned before the first is applied. Steps are applied in the order of
their plans.

A sequence is *held* while the executor is down or others are on trial. Then it waits at the adapter gate, then in
fair order for blocks and a seat. Then it runs until it is finished, preempted or parked. Sequences that are preempted,
parked, held again or lost with the executor all keep their tokens and give up everything else. Their computed blocks
stay in the prefix cache until the blocks are needed, so resuming soon is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from descant.contract.plan import EngineLimits, Row, RowResult, StepResult
from descant.scheduling.deadlines import Deadlines
from descant.scheduling.life import ExecutorLife
from descant.scheduling.planning import Planner
from descant.scheduling.policy_adapters import PolicyAdapters
from descant.scheduling.results import take_result
from descant.scheduling.rows import PlannedStep, StepBuilder
from descant.scheduling.sequence import Sequence, SequenceTable
from descant.scheduling.sequence_states import SequenceStates
from descant_client.errors import ExecutorFailed, InternalError


class Policy:
    """Schedules the sequences of `table`. Live ones in it at the start are treated as preempted.

    `now` is the clock, in seconds. `max_queued` sequences of one principal may wait, unless its requests give another
    limit. Every sequence that ends is reported to its sink.
    """

    def __init__(
        self,
        table: SequenceTable,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        now: Callable[[], float],
        max_queued: int | None = None,
    ) -> None:
        self.states = SequenceStates(table, now, max_queued)
        self.adapters = PolicyAdapters(self.states)
        self._num_seats = min(max_num_seqs, max_num_batched_tokens)  # every running sequence may decode in one step
        self._max_num_batched_tokens = max_num_batched_tokens
        self._deadlines = Deadlines(table)
        for sequence in table:
            sequence.forget_device_state()
            sequence.status = "waiting"  # the message that unparks it may have been lost with the policy before
            self._deadlines.add(sequence)
            self.states.hold(sequence)

    # ---- sequences come and go ------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Number of running sequences, without those that only keep a seat until their last step is applied."""
        return len(self.states.lineup.running)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are held or wait for an adapter, for blocks or for a seat."""
        life = self.states.life
        return self.states.lineup.num_waiting + (life.gate.num_sequences if life else 0)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Add the choices of a new request to the table: all of them or none.

        While the executor is down its sizes are unknown, and every sequence passes the checks against them.

        Raises:
            InvalidRequest: the prompt leaves no room for a token in the context or in the KV cache, or there are more
                choices than may ever wait.
            AdapterTooLarge, UnsupportedRequest: the adapter will never have a place.
            Overloaded: too many sequences of the principal wait already.
        """
        sequences, states = list(sequences), self.states
        if states.life is not None:
            for sequence in sequences:
                states.life.check_fits(sequence)
        now = states.now()
        states.lineup.limits.check(sequences, now)
        for sequence in sequences:
            sequence.arrival_s = now
            states.table.add(sequence)
            self._deadlines.add(sequence)
            states.enter(sequence)

    def cancel(self, request_id: str) -> None:
        """Finish all choices of a request, if it is known. Their tokens of steps in flight are lost."""
        for sequence in self.states.table.of_request(request_id):
            self.states.finish(sequence, "cancelled")

    def unpark(self, sequence_id: int) -> None:
        """Continue a parked sequence: its sink has room again. Does nothing to sequences that are not parked."""
        sequence = self.states.table.get(sequence_id)
        if sequence is None or sequence.status != "parked":
            return
        if self.states.in_flight.has_sequence(sequence):
            sequence.status = "waiting"  # `apply` lets it enter after its last step in flight
        else:
            self.states.enter(sequence)

    # ---- deadlines ------------------------------------------------------------------------------------------------

    def seconds_to_deadline(self) -> float:
        """Return the time until the next deadline; infinity if there is none."""
        return max(0.0, self._deadlines.next_s - self.states.now())

    def expire(self) -> None:
        """Finish the sequences that are past their deadline with DeadlineExceeded. Called by `plan` too."""
        if math.isinf(self._deadlines.next_s):
            return
        now = self.states.now()
        while (expired := self._deadlines.take_expired(now)) is not None:
            self.states.finish(expired[0], "error", expired[1])

    # ---- the executor comes and goes ------------------------------------------------------------------------------

    def on_executor_up(self, limits: EngineLimits, adapter_bytes: int) -> None:
        """Start scheduling on an executor without rows or adapters. `adapter_bytes` is the size of its arena."""
        life = ExecutorLife(self.states.table.next_epoch(), limits, adapter_bytes)
        life.gate.set_pins(self.adapters.pins)
        self.states.start_life(life)

    def on_executor_lost(self, reason: str) -> bool:
        """Preempt every sequence, because the executor died. The culprit, if found, fails with ExecutorFailed.

        Returns whether that life was productive: it completed a step, or there are fewer suspects than before.
        """
        life, verdict = self.states.life, self.states.end_life()
        if verdict.culprit is not None and (culprit := self.states.table.get(verdict.culprit)) is not None:
            self.states.finish(culprit, "error", ExecutorFailed(reason))
        return verdict.is_narrower or (life is not None and life.num_steps > 0)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def plan(self) -> PlannedStep | None:
        """Plan the next step. None: nothing can run before the oldest step in flight is applied, or at all."""
        states = self.states
        begun_s = states.now()
        self.expire()
        life = states.life
        if life is None or len(states.in_flight) == life.max_steps_in_flight or states.must_drain:
            return None
        states.begin_step(life)
        builder = StepBuilder(self._max_num_batched_tokens)
        Planner(states, life, self._num_seats, builder).plan()
        if not builder:
            return None
        step = life.num_steps + len(states.in_flight) + 1
        planned = builder.build(life.epoch, step, life.take_drops(), begun_s)
        states.in_flight.add(planned)
        return planned

    def is_in_flight(self, planned: PlannedStep) -> bool:
        """Return whether the step was neither applied nor lost with its executor."""
        return self.states.in_flight.has_step(planned)

    def apply(self, planned: PlannedStep, result: StepResult) -> None:
        """Apply the result of the oldest step and pass new tokens to the sinks. Discard results of an earlier executor.

        Raises:
            InternalError: the result answers another plan. Nothing was applied and the executor cannot be trusted.
        """
        states = self.states
        life = states.life
        if life is None or not self.is_in_flight(planned) or result.epoch != life.epoch:
            return
        states.in_flight.complete(planned, result)
        life.num_steps += 1
        now = states.now()
        for sequence, row, row_result in zip(planned.sequences, planned.plan.rows, result.rows, strict=True):
            if sequence.status == "running":
                self._apply_row(life, sequence, row, row_result, now)
            elif sequence.device.last_step == result.step:
                states.leave_flight(sequence)
        if life.max_draft_nodes:
            is_forced = any(sequence.always_verifies for sequence in planned.sequences)
            seconds = max(result.device_s, states.now() - planned.begun_s)
            life.draft_choice.learn(planned.plan, result, seconds, is_forced=is_forced)

    # ---- applying -------------------------------------------------------------------------------------------------

    def _apply_row(self, life: ExecutorLife, sequence: Sequence, row: Row, result: RowResult, now: float) -> None:
        states = self.states
        try:
            num_new = take_result(life, sequence, row, result)
        except InternalError as error:
            states.finish(sequence, "error", error)
            return
        except ValueError as exc:  # packed numbers are cut off, or their count is wrong
            states.finish(sequence, "error", InternalError(f"the engine's answer makes no sense: {exc}"))
            return
        if num_new is None:
            return
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        states.lineup.fairness.charge_output(sequence, num_new)
        if states.blame.is_watching:
            states.blame.on_token(sequence.id)
        has_room = sequence.request.sink.put(sequence, num_new)
        if (reason := sequence.output.finish_reason) is not None:
            states.finish(sequence, reason)
        elif not has_room:
            states.park(sequence)
