"""`Lineup`: where every sequence stands: held, waiting for its adapter, waiting in fair order, or on a seat."""

from __future__ import annotations

from bisect import bisect_left, insort

from descant.scheduling.adapter_turns import AdapterTurns
from descant.scheduling.admission import QueueLimits
from descant.scheduling.fairness import Fairness
from descant.scheduling.sequence import Sequence, by_arrival


class Lineup:
    """A sequence stands in one place at most. Parked and finished ones stand nowhere.

    Those that finish or are parked in flight keep their seat, without standing there, until they are out of it.
    """

    def __init__(self, max_queued: int | None) -> None:
        self.held: dict[int, Sequence] = {}
        self.fairness = Fairness()
        self.adapter_turns = AdapterTurns(self.fairness)
        self.running: list[Sequence] = []  # in order of arrival
        self.leaving: set[int] = set()  # ids of those in flight that no longer run
        self.limits = QueueLimits(max_queued)

    @property
    def num_waiting(self) -> int:
        """Sequences that are held or wait in fair order."""
        return len(self.held) + self.fairness.num_waiting

    def hold(self, sequence: Sequence, now: float) -> None:
        """The sequence may not run for the present."""
        sequence.status = "waiting"
        self.limits.enter(sequence, now)
        self.held[sequence.id] = sequence

    def take_held(self) -> list[Sequence]:
        """Let everybody go who was held; return them in order of arrival."""
        held, self.held = sorted(self.held.values(), key=by_arrival), {}
        return held

    def seat(self, sequence: Sequence, now: float) -> None:
        """A sequence that waited in fair order, and has its blocks, runs from now on."""
        self.limits.leave(sequence, now)
        sequence.status = "running"
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = now
            sequence.num_cached_tokens = sequence.device.num_computed
        self.fairness.start(sequence)
        insort(self.running, sequence, key=by_arrival)

    @property
    def num_seated(self) -> int:
        """Seats that are taken."""
        return len(self.running) + len(self.leaving)

    def leave_in_flight(self, sequence: Sequence) -> None:
        """The sequence no longer runs, but the executor may be working on it still."""
        self.remove(sequence)
        self.leaving.add(sequence.id)

    def remove(self, sequence: Sequence) -> None:
        """Take the sequence from where it stands."""
        self.leaving.discard(sequence.id)
        self.held.pop(sequence.id, None)
        self.fairness.remove(sequence)
        self.adapter_turns.remove(sequence)
        index = bisect_left(self.running, sequence.id, key=by_arrival)
        if index < len(self.running) and self.running[index] is sequence:
            del self.running[index]

    def clear(self) -> None:
        """Nobody stands anywhere; whoever was held still is."""
        self.fairness.clear()
        self.adapter_turns.clear()
        self.running = []
        self.leaving.clear()
