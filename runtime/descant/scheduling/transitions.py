"""`Transitions`: how a sequence comes to stand where it stands, and what it has to give up on the way.

Whoever is in flight is not preempted, and what it holds stays its own until it is out of there, because the executor
may still write to it.
"""

from __future__ import annotations

from collections.abc import Callable

from descant.scheduling.blame import Blame
from descant.scheduling.in_flight import InFlight
from descant.scheduling.life import ExecutorLife
from descant.scheduling.lineup import Lineup
from descant.scheduling.sequence import Sequence, SequenceTable
from descant_client.errors import DescantError
from descant_client.protocol import FinishReason


class Transitions:
    """Keeps table, lineup, executor and steps in flight in agreement."""

    def __init__(self, table: SequenceTable, now: Callable[[], float], max_queued: int | None) -> None:
        self._table = table
        self._now = now
        self._blame = Blame()
        self._trial: frozenset[int] | None = None  # the blame's, as of the last plan
        self._life: ExecutorLife | None = None  # None: the executor is down
        self._lineup = Lineup(max_queued)
        self._in_flight = InFlight()
        self._is_draining = False  # somebody is to be preempted as soon as nothing is in flight

    def _enter(self, sequence: Sequence) -> None:
        """Let a sequence that has nothing but its tokens take its way to a seat."""
        sequence.status = "waiting"
        self._lineup.limits.enter(sequence, self._now())
        if self._life is None or not self._blame.allows(sequence.id):
            self._hold(sequence)
            return
        if sequence.request.is_adapter_optional and sequence.adapter and not self._life.gate.offer(sequence.adapter):
            sequence.adapter = None
        try:
            if not sequence.output_ids:
                self._life.check_fits(sequence)  # it may have been submitted while the executor was down
            is_ready = self._life.gate.enter(sequence)
        except DescantError as error:
            self._finish(sequence, "error", error)
            return
        if is_ready:
            self._lineup.fairness.wait(sequence)
        elif sequence.device.spans is None:
            self._lineup.slot_turns.wait(sequence)

    def _hold(self, sequence: Sequence) -> None:
        if sequence.status != "parked":
            self._lineup.hold(sequence, self._now())

    def _may_preempt(self) -> bool:
        """Nobody is preempted in flight. Once somebody should be, no step is planned until nothing is in flight."""
        self._is_draining = bool(self._in_flight)
        return not self._is_draining

    def _preempt(self, sequence: Sequence) -> None:
        sequence.num_preemptions += 1
        self._release(sequence)
        self._enter(sequence)

    def _clear_out(self, sequences: list[Sequence]) -> Callable[[], None] | None:
        """Preempt all of them, if that may be; what is returned lets them take their way to a seat again."""
        if not self._may_preempt():
            return None
        for sequence in sequences:
            sequence.num_preemptions += sequence.status == "running"
            self._release(sequence)
            sequence.status = "waiting"

        def enter_again() -> None:
            for sequence in sequences:
                if not sequence.is_finished:  # with another choice of its request
                    self._enter(sequence)

        return enter_again

    def _finish(self, sequence: Sequence, reason: FinishReason, error: DescantError | None = None) -> None:
        sequence.output.finish_reason, sequence.output.error = reason, error
        sequence.finished_s = self._now()
        self._leave(sequence)
        sequence.status = "finished"
        self._lineup.limits.leave(sequence, sequence.finished_s)
        self._table.remove(sequence)
        if sequence.drafter is not None:
            sequence.drafter.forget_text()
        self._blame.left(sequence.id)
        sequence.request.sink.end(sequence)
        for sibling in self._table.of_request(sequence.request_id) if reason == "error" else ():
            self._finish(sibling, "cancelled")  # a request fails as a whole: nobody would read its other choices

    def _leave(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens, once nothing in flight needs it."""
        if self._in_flight.holds(sequence):
            self._lineup.leave_in_flight(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens, and take it out of every queue."""
        self._lineup.remove(sequence)
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
        for sequence in self._lineup.take_held():
            if not sequence.is_finished:
                self._enter(sequence)
