"""`Policy`: which sequences run in the next step, and what becomes of a step's result. It never waits.

The actor around it goes round like this, and passes on what it hears from elsewhere in between:

    planned = policy.plan()                    # None: nothing can run now
    work = policy.adapter_work()               # moves first; loads may take as long as they like
    for load in work.loads:
        ...                                    # then policy.loaded(load) or policy.load_failed(load, error)
    result = ...                               # run planned.plan on the engine
    policy.apply(planned, result)              # or policy.executor_lost(reason), later policy.executor_up(...)

An executor may let it plan further steps before the first is applied; they are applied in the order of their plans.

A sequence is *held* while the executor is down or others are on trial, then waits at the adapter gate, then in fair
order for blocks and a seat, then runs until it is finished, preempted or parked. Preempted, parked, held again
and lost with the executor are all the same: the tokens are kept and everything else is given up. What a sequence had
computed stays in the prefix cache until somebody needs the blocks, so coming back soon is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from descant.contract.plan import EngineLimits, Row, RowResult, StepResult
from descant.contract.version import AdapterVersion
from descant.scheduling.deadlines import Deadlines
from descant.scheduling.life import ExecutorLife
from descant.scheduling.placement.adapter_work import AdapterLoad, AdapterWork
from descant.scheduling.planning import Moves, Planner
from descant.scheduling.results import take_result
from descant.scheduling.rows import PlannedStep, StepBuilder
from descant.scheduling.sequence import Sequence, SequenceTable
from descant.scheduling.transitions import Transitions
from descant_client.errors import DescantError, ExecutorFailed, InternalError


class Policy(Transitions):
    """Decides over the sequences of `table`, which may hold live ones already: they are taken for preempted.

    `now` is the clock, in seconds. `max_queued` sequences of one principal may wait, unless they say otherwise. A
    sequence that ends, for whatever reason, ends through its sink.
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
        super().__init__(table, now, max_queued)
        self._num_seats = min(max_num_seqs, max_num_batched_tokens)  # everybody running may decode in one step
        self._max_num_batched_tokens = max_num_batched_tokens
        self._pins: tuple[AdapterVersion, ...] = ()
        self._deadlines = Deadlines(table)
        for sequence in table:
            sequence.forget_device_state()
            sequence.status = "waiting"  # the message that unparks it may have been lost with the policy before
            self._deadlines.add(sequence)
            self._hold(sequence)

    # ---- sequences come and go ------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences with a seat."""
        return len(self._lineup.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that would run if they could: held, waiting for an adapter, for blocks or for a seat."""
        return self._lineup.num_waiting + (self._life.gate.num_sequences if self._life else 0)

    def check_fits(self, sequence: Sequence) -> None:
        """Check that the sequence can ever run. While the executor is down nothing is known: everything passes.

        Raises:
            InvalidRequest: the prompt leaves no room for a token in the context or in the KV cache.
            AdapterTooLarge, UnsupportedRequest: its adapter will never have a place.
        """
        if self._life is not None:
            self._life.check_fits(sequence)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take on the choices of a new request and add them to the table: all of them or none.

        Raises:
            InvalidRequest, AdapterTooLarge, UnsupportedRequest: as `check_fits`, or more choices than may ever wait.
            Overloaded: too many sequences of its principal wait already.
        """
        sequences = list(sequences)
        for sequence in sequences:
            self.check_fits(sequence)
        now = self._now()
        self._lineup.limits.check(sequences, now)
        for sequence in sequences:
            sequence.arrival_s = now
            self._table.add(sequence)
            self._deadlines.add(sequence)
            self._enter(sequence)

    def cancel(self, request_id: str) -> None:
        """Finish all choices of a request; unknown requests are none. Their tokens of a step in flight are lost."""
        for sequence in self._table.of_request(request_id):
            self._finish(sequence, "cancelled")

    def unpark(self, sequence_id: int) -> None:
        """The sequence's sink has room again. Sequences that are not parked are left alone."""
        sequence = self._table.get(sequence_id)
        if sequence is None or sequence.status != "parked":
            return
        if self._in_flight.holds(sequence):
            sequence.status = "waiting"  # until it is out of there
        else:
            self._enter(sequence)

    # ---- deadlines ------------------------------------------------------------------------------------------------

    def seconds_to_deadline(self) -> float:
        """Return how long `expire` has nothing to do; infinity if there are no deadlines."""
        return max(0.0, self._deadlines.next_s - self._now())

    def expire(self) -> None:
        """Finish whose deadline has passed with DeadlineExceeded; `plan` does so too."""
        if math.isinf(self._deadlines.next_s):
            return
        now = self._now()
        while (expired := self._deadlines.take_expired(now)) is not None:
            self._finish(expired[0], "error", expired[1])

    # ---- the executor comes and goes ------------------------------------------------------------------------------

    def executor_up(self, limits: EngineLimits, adapter_bytes: int) -> None:
        """An executor without rows or adapters is ready. `adapter_bytes` is the size of its arena."""
        assert self._life is None, "one executor at a time"
        self._life = ExecutorLife(self._table.next_epoch(), limits, adapter_bytes)
        self._life.gate.set_pins(self._pins)
        self._admit_held()

    def executor_lost(self, reason: str) -> bool:
        """The executor died: everything is preempted at once, and who is found guilty fails with ExecutorFailed.

        Returns whether that life was of use: it completed a step, or its death narrowed the circle of suspects.
        """
        in_flight = self._in_flight.sequences + (self._life.gate.loading if self._life else [])
        life, self._life = self._life, None
        self._in_flight.clear()
        self._lineup.clear()
        for sequence in self._table:
            sequence.num_preemptions += sequence.status == "running"
            sequence.forget_device_state()
            self._hold(sequence)
        verdict = self._blame.lost(sequence.id for sequence in in_flight)
        for sequence in in_flight:
            if sequence.is_finished:  # in flight: it may be the killer, but there is nothing left to try
                self._blame.left(sequence.id)
        self._trial = self._blame.trial
        if verdict.culprit is not None and (culprit := self._table.get(verdict.culprit)) is not None:
            self._finish(culprit, "error", ExecutorFailed(reason))
        return verdict.is_narrower or (life is not None and life.num_steps > 0)

    # ---- adapters -------------------------------------------------------------------------------------------------

    def adapter_work(self) -> AdapterWork:
        """Return what to do now, each thing once. Nothing in flight uses the slots and bytes of its loads."""
        return self._life.gate.take_work() if self._life else AdapterWork()

    def set_pins(self, versions: Iterable[AdapterVersion]) -> None:
        """Keep these versions, and no others, on the device; also on executors to come."""
        self._pins = tuple(versions)
        if self._life is not None:
            self._life.gate.set_pins(self._pins)

    def forget_version(self, digest: str) -> None:
        """Free a version's place as soon as nobody uses it."""
        if self._life is not None:
            self._life.gate.forget_version(digest)

    def prefetched(self, digest: str) -> None:
        """A prefetch is over, well or not: whoever waits for it has nothing more to do with what the executor does."""
        if self._life is not None:
            self._life.gate.prefetched(digest)

    def read(self, load: AdapterLoad) -> None:
        """The load's version is in host memory, and not yet in its place: another load may be read meanwhile."""
        if self._life is not None and load.epoch == self._life.epoch:
            self._life.gate.read(load)

    def loaded(self, load: AdapterLoad) -> None:
        """The load is done: the sequences that waited for it may run. Loads of an earlier executor are ignored."""
        if self._life is not None and load.epoch == self._life.epoch:
            for sequence in self._life.gate.loaded(load):
                self._lineup.fairness.wait(sequence)

    def load_failed(self, load: AdapterLoad, error: DescantError) -> None:
        """The load failed: the sequences that waited for it fail with `error`. The next to want it tries again.

        An executor's death is no failure of its loads: that is `executor_lost` alone.
        """
        if self._life is not None and load.epoch == self._life.epoch:
            for sequence in self._life.gate.load_failed(load):
                if not sequence.is_finished:  # with another choice of its request
                    self._finish(sequence, "error", error)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def plan(self) -> PlannedStep | None:
        """Decide the next step; None: nothing can run before the oldest step in flight is applied, or at all."""
        begun_s = self._now()
        self.expire()
        life = self._life
        if life is None or len(self._in_flight) == life.max_steps_in_flight:
            return None
        if self._in_flight and (self._is_draining or self._trial is not self._blame.trial):
            return None
        self._is_draining = False
        self._follow_trial(life)
        for sequence in self._lineup.slot_turns.open(life.gate, self._clear_out):
            if not sequence.is_finished:  # with another choice of its request
                self._lineup.fairness.wait(sequence)
        builder = self._lineup.builder = StepBuilder(self._max_num_batched_tokens)
        moves = Moves(self._may_preempt, self._preempt, self._finish)
        Planner(self._table, life, self._lineup, self._num_seats, builder, moves, self._now()).plan()
        self._lineup.builder = None
        if not builder:
            if not self._in_flight:
                life.check_idle()
            return None
        planned = builder.build(life.epoch, life.num_steps + len(self._in_flight) + 1, life.take_drops(), begun_s)
        self._in_flight.add(planned)
        return planned

    def awaits(self, planned: PlannedStep) -> bool:
        """Return whether the step is in flight: neither applied nor lost with its executor."""
        return self._in_flight.awaits(planned)

    def apply(self, planned: PlannedStep, result: StepResult) -> None:
        """Take over what the oldest step did and tell the sinks. Results of an earlier executor are discarded.

        Raises:
            InternalError: the result answers another plan; nothing was applied and the executor is not to be trusted.
        """
        life = self._life
        if life is None or not self.awaits(planned) or result.epoch != life.epoch:
            return
        self._in_flight.take(planned, result)
        life.num_steps += 1
        now = self._now()
        for sequence, row, row_result in zip(planned.sequences, planned.plan.rows, result.rows, strict=True):
            if sequence.status == "running":
                self._apply_row(life, sequence, row, row_result, now)
            elif sequence.device.last_step == result.step:
                self._release(sequence)
                if sequence.status == "waiting":  # it was parked, and its sink has room again
                    self._enter(sequence)
        if life.max_draft_nodes:
            is_forced = any(sequence.always_verifies for sequence in planned.sequences)
            seconds = max(result.device_s, self._now() - planned.begun_s)
            life.draft_choice.learn(planned.plan, result, seconds, is_forced=is_forced)

    # ---- applying -------------------------------------------------------------------------------------------------

    def _apply_row(self, life: ExecutorLife, sequence: Sequence, row: Row, result: RowResult, now: float) -> None:
        try:
            num_new = take_result(life, sequence, row, result)
        except InternalError as error:
            self._finish(sequence, "error", error)
        except ValueError as exc:  # what is packed is cut off, or of another size than it says
            self._finish(sequence, "error", InternalError(f"the engine's answer makes no sense: {exc}"))
        else:
            if num_new is not None:
                self._take_tokens(sequence, num_new, now)

    def _take_tokens(self, sequence: Sequence, num_new: int, now: float) -> None:
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        self._lineup.fairness.charge_output(sequence, num_new)
        if self._blame.is_watching:
            self._blame.gained(sequence.id)
        has_room = sequence.request.sink.put(sequence, num_new)
        if (reason := sequence.output.finish_reason) is not None:
            self._finish(sequence, reason)
        elif not has_room:
            self._leave(sequence)
            sequence.status = "parked"
