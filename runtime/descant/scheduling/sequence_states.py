"""`SequenceStates`: moves sequences between waiting, running, parked and finished, and takes back their resources.

A sequence in flight is not preempted. It keeps its blocks, its adapter and its seat until its last step is applied,
because the executor may still write to them.
"""

from __future__ import annotations

from collections.abc import Callable

from descant.scheduling.blame import Blame, Verdict
from descant.scheduling.in_flight import InFlight
from descant.scheduling.life import ExecutorLife
from descant.scheduling.lineup import Lineup
from descant.scheduling.sequence import Sequence, SequenceTable
from descant_client.errors import DescantError
from descant_client.protocol import FinishReason


class SequenceStates:
    """Keeps table, lineup, executor life and steps in flight in agreement."""

    def __init__(self, table: SequenceTable, now: Callable[[], float], max_queued: int | None) -> None:
        self.table = table
        self.now = now
        self.life: ExecutorLife | None = None  # None: the executor is down
        self.lineup = Lineup(max_queued)
        self.in_flight = InFlight()
        self.blame = Blame()
        self._trial: frozenset[int] | None = None  # the blame's, as of the last planned step
        self._is_draining = False  # a sequence is to be preempted as soon as nothing is in flight

    # ---- the executor ---------------------------------------------------------------------------------------------

    def start_life(self, life: ExecutorLife) -> None:
        """Let all held sequences that are not excluded by a trial enter on a new executor."""
        assert self.life is None, "one executor at a time"
        self.life = life
        self._admit_held()

    def end_life(self) -> Verdict:
        """Preempt and hold every sequence, because the executor died; return the verdict on those in flight."""
        in_flight = self.in_flight.sequences + (self.life.gate.loading if self.life else [])
        self.life = None
        self.in_flight.clear()
        self.lineup.clear()
        for sequence in self.table:
            sequence.num_preemptions += sequence.status == "running"
            sequence.forget_device_state()
            self.hold(sequence)
        verdict = self.blame.on_executor_lost(sequence.id for sequence in in_flight)
        for sequence in in_flight:
            if sequence.is_finished:  # it may be the culprit, but it will not run again
                self.blame.on_finished(sequence.id)
        self._trial = self.blame.trial
        return verdict

    # ---- before a step --------------------------------------------------------------------------------------------

    @property
    def must_drain(self) -> bool:
        """Whether no step may be planned until nothing is in flight."""
        return bool(self.in_flight) and (self._is_draining or self._trial is not self.blame.trial)

    def begin_step(self, life: ExecutorLife) -> None:
        """Hold and release sequences as a new trial demands, then give adapter places to waiting sequences."""
        self._is_draining = False
        if self._trial is not self.blame.trial:
            self._follow_trial()
        for sequence in self._place_adapters(life):
            if not sequence.is_finished:  # with another choice of its request
                self.lineup.fairness.enqueue(sequence)

    # ---- towards a seat -------------------------------------------------------------------------------------------

    def enter(self, sequence: Sequence) -> None:
        """Put a sequence that has nothing on the device into the queue it has to wait in, or finish it with an error.

        That is the set of held sequences, the gate of its adapter, or the queue of its principal.
        """
        sequence.status = "waiting"
        self.lineup.limits.enter(sequence, self.now())
        life = self.life
        if life is None or not self.blame.allows(sequence.id):
            self.hold(sequence)
            return
        adapter = sequence.adapter
        if sequence.request.is_adapter_optional and adapter and not life.gate.load_if_free(adapter):
            sequence.adapter = None
        try:
            if not sequence.output_ids:
                life.check_fits(sequence)  # it may have been submitted while the executor was down
            is_ready = life.gate.enter(sequence)
        except DescantError as error:
            self.finish(sequence, "error", error)
            return
        if is_ready:
            self.lineup.fairness.enqueue(sequence)
        elif sequence.device.spans is None:
            self.lineup.adapter_turns.enqueue(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Keep a sequence from running until the executor is up and no trial excludes it; parked ones stay parked."""
        if sequence.status != "parked":
            self.lineup.hold(sequence, self.now())

    # ---- away from a seat -----------------------------------------------------------------------------------------

    def may_preempt(self) -> bool:
        """Return whether sequences may be preempted now: nothing is in flight.

        If not, no further step is planned until nothing is in flight.
        """
        self._is_draining = bool(self.in_flight)
        return not self._is_draining

    def preempt(self, sequence: Sequence) -> None:
        """Release all state of a running sequence but its tokens, and put it into a queue again."""
        sequence.num_preemptions += 1
        self._release(sequence)
        self.enter(sequence)

    def park(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens; it does not run until its sink has room again."""
        self._leave(sequence)
        sequence.status = "parked"

    def finish(self, sequence: Sequence, reason: FinishReason, error: DescantError | None = None) -> None:
        """End a sequence and tell its sink. An error cancels the other choices of the request: it fails as a whole."""
        sequence.output.finish_reason, sequence.output.error = reason, error
        sequence.finished_s = self.now()
        self._leave(sequence)
        sequence.status = "finished"
        self.lineup.limits.leave(sequence, sequence.finished_s)
        self.table.remove(sequence)
        if sequence.drafter is not None:
            sequence.drafter.forget_text()
        self.blame.on_finished(sequence.id)
        sequence.request.sink.end(sequence)
        for sibling in self.table.of_request(sequence.request_id) if reason == "error" else ():
            self.finish(sibling, "cancelled")

    def leave_flight(self, sequence: Sequence) -> None:
        """Release a sequence that stopped running in flight, after its last step. Enter it again if it was unparked."""
        self._release(sequence)
        if sequence.status == "waiting":
            self.enter(sequence)

    # ---- invariants -----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that exactly the blocks of running and in-flight sequences are in use, and that adapter places agree.

        Takes milliseconds if there are many blocks.
        """
        if self.life is not None:
            users = {sequence.id: sequence for sequence in (*self.lineup.running, *self.in_flight.sequences)}
            self.life.blocks.check_integrity(sequence.device.block_table for sequence in users.values())
            self.life.gate.residency.check_integrity()

    # ---- the details ----------------------------------------------------------------------------------------------

    def _leave(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens, at once or after its last step in flight."""
        if self.in_flight.has_sequence(sequence):
            self.lineup.leave_in_flight(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take everything from the sequence but its tokens, and take it out of every queue."""
        self.lineup.remove(sequence)
        if self.life is not None:
            self.life.release(sequence)

    def _place_adapters(self, life: ExecutorLife) -> list[Sequence]:
        """Give adapter places to waiting sequences, preempting others if that is fair; return those that may run."""
        gate, turns = life.gate, self.lineup.adapter_turns
        ready, claimants = turns.place_waiting(gate)
        for sequence in claimants:
            victims = turns.victims_for(sequence, gate)
            if not victims:
                continue
            if not self.may_preempt():
                turns.look_again()
                continue
            for victim in victims:
                victim.num_preemptions += victim.status == "running"
                self._release(victim)
                victim.status = "waiting"
            ready += turns.place(sequence, gate)
            for victim in victims:
                if not victim.is_finished:  # with another choice of its request
                    self.enter(victim)
        return ready

    def _follow_trial(self) -> None:
        """Hold all sequences that the present trial excludes, and let the others enter."""
        self._trial = self.blame.trial
        for sequence in self.table:
            if sequence.status in ("waiting", "running") and not self.blame.allows(sequence.id):
                sequence.num_preemptions += sequence.status == "running"
                self._release(sequence)
                self.hold(sequence)
        self._admit_held()

    def _admit_held(self) -> None:
        for sequence in self.lineup.take_held():
            if not sequence.is_finished:
                self.enter(sequence)
