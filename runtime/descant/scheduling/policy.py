"""`Policy`: which sequences run in the next step, and what becomes of a step's result. It never waits.

The actor around it goes round like this, and passes on what it hears from elsewhere in between:

    planned = policy.plan()                    # None: nothing can run now
    for load in policy.loads():                # start them; they may take as long as they like
        ...                                    # then policy.loaded(load) or policy.load_failed(load, error)
    result = ...                               # run planned.plan on the engine
    policy.apply(planned, result)              # or policy.executor_lost(reason), later policy.executor_up(...)

A sequence is *held* while the executor is down or others are on trial, then waits at the adapter gate, then in order
of arrival for blocks and a seat, then runs until it is finished, preempted or parked. Preempted, parked, held again
and lost with the executor are all the same: the tokens are kept and everything else is given up. What a sequence had
computed stays in the prefix cache until somebody needs the blocks, so coming back soon is cheap.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable

from descant.scheduling.blame import Blame
from descant.scheduling.gate import AdapterLoad
from descant.scheduling.life import ExecutorLife
from descant.scheduling.plan import EngineLimits, Row, RowResult, StepResult
from descant.scheduling.rows import PlannedStep, StepBuilder, put_prompt_logprobs, sampled_logprobs, sampled_tokens
from descant.scheduling.sequence import Sequence, SequenceTable, by_arrival
from descant_client.errors import DescantError, ExecutorFailed, InternalError
from descant_client.protocol import FinishReason


class Policy:
    """Decides over the sequences of `table`, which may hold live ones already: they are taken for preempted.

    `now` is the clock, in seconds. A sequence that ends, for whatever reason, ends through its sink.
    """

    def __init__(
        self, table: SequenceTable, *, max_num_seqs: int, max_num_batched_tokens: int, now: Callable[[], float]
    ) -> None:
        self._table = table
        self._now = now
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._blame = Blame()
        self._trial: frozenset[int] | None = None  # the blame's, as of the last plan
        self._life: ExecutorLife | None = None  # None: the executor is down
        self._held: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # they hold their adapters; in order of arrival
        self._running: list[Sequence] = []  # in order of arrival
        self._in_flight: PlannedStep | None = None
        self._retired: list[Sequence] = []  # finished in flight: the engine may still write to their blocks
        for sequence in table:
            sequence.forget_device_state()
            sequence.status = "waiting"  # the message that unparks it may have been lost with the policy before
            self._hold(sequence)

    # ---- sequences come and go ------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Sequences with a seat."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that would run if they could: held, waiting for an adapter, for blocks or for a seat."""
        return len(self._held) + len(self._waiting) + (self._life.gate.num_sequences if self._life else 0)

    def check_fits(self, sequence: Sequence) -> None:
        """Check that the sequence can ever run. While the executor is down nothing is known: everything passes.

        Raises:
            InvalidRequest: the prompt leaves no room for a token in the context or in the KV cache.
            AdapterTooLarge, UnsupportedRequest: its adapter will never have a place.
        """
        if self._life is not None:
            self._life.check_fits(sequence)

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take on new sequences and add them to the table: all of them or none. Raises as `check_fits`."""
        sequences = list(sequences)
        for sequence in sequences:
            self.check_fits(sequence)
        now = self._now()
        for sequence in sequences:
            sequence.arrival_s = now
            self._table.add(sequence)
            self._enter(sequence)

    def cancel(self, request_id: str) -> None:
        """Finish all choices of a request; unknown requests are none. Their tokens of a step in flight are lost."""
        for sequence in self._table.of_request(request_id):
            self._finish(sequence, "cancelled")

    def unpark(self, sequence_id: int) -> None:
        """The sequence's sink has room again. Sequences that are not parked are left alone."""
        sequence = self._table.get(sequence_id)
        if sequence is not None and sequence.status == "parked":
            self._enter(sequence)

    # ---- the executor comes and goes ------------------------------------------------------------------------------

    def executor_up(self, limits: EngineLimits, adapter_bytes: int) -> None:
        """An executor without rows or adapters is ready. `adapter_bytes` is the size of its arena."""
        assert self._life is None, "one executor at a time"
        self._life = ExecutorLife(self._table.next_epoch(), limits, adapter_bytes)
        self._admit_held()

    def executor_lost(self, reason: str) -> bool:
        """The executor died: everything is preempted at once, and who is found guilty fails with ExecutorFailed.

        Returns whether that life was of use: it completed a step, or its death narrowed the circle of suspects.
        """
        in_flight = [*(self._in_flight.sequences if self._in_flight else ())]
        in_flight += self._life.gate.loading if self._life else []
        life, self._life, self._in_flight = self._life, None, None
        self._waiting, self._running, self._retired = [], [], []
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

    def loads(self) -> list[AdapterLoad]:
        """Return the loads to start now, each once. Nothing in flight uses their slots and bytes."""
        return self._life.gate.take_loads() if self._life else []

    def loaded(self, load: AdapterLoad) -> None:
        """The load is done: the sequences that waited for it may run. Loads of an earlier executor are ignored."""
        if self._life is not None and load.epoch == self._life.epoch:
            for sequence in self._life.gate.loaded(load):
                insort(self._waiting, sequence, key=by_arrival)

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
        """Decide the next step; None: nothing can run. It must be applied, or the executor lost, before the next."""
        assert self._in_flight is None, "one step at a time"
        life = self._life
        if life is None:
            return None
        self._follow_trial(life)
        for sequence in life.gate.open():
            insort(self._waiting, sequence, key=by_arrival)
        builder = StepBuilder(self._max_num_batched_tokens)
        self._plan_decodes(life, builder)
        self._plan_prefills(builder)
        self._admit_waiting(life, builder)
        if not builder:
            life.check_idle()
            return None
        self._in_flight = builder.build(life.epoch, life.num_steps + 1, life.take_drops())
        return self._in_flight

    def apply(self, planned: PlannedStep, result: StepResult) -> None:
        """Take over what a step did and tell the sinks. Results of an earlier executor are discarded.

        Raises:
            InternalError: the result answers another plan; nothing was applied and the executor is not to be trusted.
        """
        life, plan = self._life, planned.plan
        if life is None or planned is not self._in_flight or result.epoch != life.epoch:
            return
        rows = plan.rows
        if result.step != plan.step or [row.row for row in result.rows] != [row.row for row in rows]:
            raise InternalError("the executor answered another step than the one it was given")
        self._in_flight = None
        life.num_steps += 1
        now = self._now()
        for sequence, row, row_result in zip(planned.sequences, rows, result.rows, strict=True):
            if sequence.finish_reason is None:
                self._apply_row(life, sequence, row, row_result, now)
        retired, self._retired = self._retired, []
        for sequence in retired:
            self._release(sequence)

    # ---- planning -------------------------------------------------------------------------------------------------

    def _plan_decodes(self, life: ExecutorLife, builder: StepBuilder) -> None:
        block_size, index = life.blocks.block_size, 0
        while index < len(self._running):
            sequence = self._running[index]
            num_tokens = len(sequence.prompt_ids) + len(sequence.output_ids)
            if sequence.num_computed + 1 < num_tokens:
                index += 1
            elif num_tokens <= len(sequence.block_table) * block_size:
                builder.decode(sequence)
                index += 1
            elif (new_blocks := life.grow(sequence)) is not None:
                builder.decode(sequence, new_blocks)
                index += 1
            else:
                # The latest to arrive gives way. Rows are planned in order of arrival: it has none in this step.
                self._preempt(self._running[-1])

    def _plan_prefills(self, builder: StepBuilder) -> None:
        for sequence in self._running:
            if builder.num_tokens_left == 0:
                break
            if sequence.num_computed + 1 < sequence.num_tokens:
                builder.prefill(sequence)

    def _admit_waiting(self, life: ExecutorLife, builder: StepBuilder) -> None:
        index = 0
        while index < len(self._waiting) and len(self._running) < self._max_num_seqs and builder.num_tokens_left:
            sequence = self._waiting[index]
            if sequence.num_tokens >= life.max_tokens:
                self._finish(sequence, "length")  # it began on an executor with more room
            elif sequence.choice and life.will_share(sequence, self._table.first_of_request(sequence.request_id)):
                index += 1
            elif life.allocate(sequence, len(self._running)):
                del self._waiting[index]
                self._run(life, sequence)
                builder.admit(sequence)
            else:
                break

    def _run(self, life: ExecutorLife, sequence: Sequence) -> None:
        sequence.status = "running"
        sequence.token_limit = life.token_limit(sequence)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self._now()
            sequence.num_cached_tokens = sequence.num_computed
        insort(self._running, sequence, key=by_arrival)

    # ---- applying -------------------------------------------------------------------------------------------------

    def _apply_row(self, life: ExecutorLife, sequence: Sequence, row: Row, result: RowResult, now: float) -> None:
        if result.error is not None:
            self._finish(sequence, "error", InternalError(result.error))
            return
        start, end = sequence.num_computed, sequence.num_computed + row.num_new_tokens
        is_sampled = end == len(sequence.prompt_ids) + len(sequence.output_ids)
        if result.num_computed != end or (len(result.token_ids) == 4) != is_sampled:
            self._finish(sequence, "error", InternalError("the engine computed something else than was planned"))
            return
        sequence.num_computed = end
        if result.prompt_logprobs is not None:
            put_prompt_logprobs(sequence, start + 1, result.prompt_logprobs)
        if end // life.blocks.block_size > sequence.num_registered:
            life.register(sequence)
        if is_sampled:
            self._take_tokens(sequence, result, now)

    def _take_tokens(self, sequence: Sequence, result: RowResult, now: float) -> None:
        token_ids = sampled_tokens(result)
        num_new = sequence.append(token_ids, sampled_logprobs(result, token_ids))
        if sequence.first_token_s is None:
            sequence.first_token_s = now
        if self._blame.is_watching:
            self._blame.gained(sequence.id)
        has_room = sequence.sink.put(sequence, num_new)
        if sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)
        elif not has_room:
            self._release(sequence)
            sequence.status = "parked"

    # ---- transitions ----------------------------------------------------------------------------------------------

    def _enter(self, sequence: Sequence) -> None:
        """Let a sequence that has nothing but its tokens take its way to a seat."""
        sequence.status = "waiting"
        if self._life is None or not self._blame.allows(sequence.id):
            self._hold(sequence)
            return
        try:
            if not sequence.output_ids:
                self._life.check_fits(sequence)  # it may have been submitted while the executor was down
            is_ready = self._life.gate.enter(sequence)
        except DescantError as error:
            self._finish(sequence, "error", error)
            return
        if is_ready:
            insort(self._waiting, sequence, key=by_arrival)

    def _hold(self, sequence: Sequence) -> None:
        if sequence.status != "parked":
            sequence.status = "waiting"
            self._held[sequence.id] = sequence

    def _preempt(self, sequence: Sequence) -> None:
        sequence.num_preemptions += 1
        self._release(sequence)
        self._enter(sequence)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: DescantError | None = None) -> None:
        sequence.finish_reason, sequence.error = reason, error
        sequence.finished_s = self._now()
        if self._in_flight is not None and sequence.status == "running":
            self._retired.append(sequence)
        else:
            self._release(sequence)
        sequence.status = "finished"
        self._table.remove(sequence)
        self._blame.left(sequence.id)
        sequence.sink.end(sequence)
        for sibling in self._table.of_request(sequence.request_id) if reason == "error" else ():
            self._finish(sibling, "cancelled")  # a request fails as a whole: nobody would read its other choices

    def _release(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens, and take it out of every queue."""
        self._held.pop(sequence.id, None)
        for queue in (self._waiting, self._running):
            index = bisect_left(queue, sequence.id, key=by_arrival)
            if index < len(queue) and queue[index] is sequence:
                del queue[index]
        if self._life is not None:
            self._life.release(sequence)

    def _follow_trial(self, life: ExecutorLife) -> None:
        """Once others are on trial, put everybody else on hold."""
        if self._trial is self._blame.trial:
            return
        self._trial = self._blame.trial
        for sequence in self._table:
            if sequence.status in ("waiting", "running") and not self._blame.allows(sequence.id):
                sequence.num_preemptions += sequence.status == "running"
                self._release(sequence)
                self._hold(sequence)
        self._admit_held()

    def _admit_held(self) -> None:
        held, self._held = sorted(self._held.values(), key=by_arrival), {}
        for sequence in held:
            if not sequence.is_finished:
                self._enter(sequence)
