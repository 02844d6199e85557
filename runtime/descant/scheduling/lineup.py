"""`Lineup`: the queues and the seats: held, waiting for an adapter, waiting in fair order, or running."""

from __future__ import annotations

from bisect import bisect_left, insort

from descant.scheduling.adapter_turns import AdapterTurns
from descant.scheduling.admission import QueueLimits
from descant.scheduling.fairness import Fairness
from descant.scheduling.sequence import Sequence, by_arrival


class Lineup:
    """A sequence is in one queue or on one seat at most. Parked and finished sequences are in none.

    Sequences that finish or are parked in flight keep their seat taken until their last step is applied.
    """

    def __init__(self, max_queued: int | None) -> None:
        self.held: dict[int, Sequence] = {}
        self.fairness = Fairness()
        self.adapter_turns = AdapterTurns(self.fairness)
        self.running: list[Sequence] = []  # in order of arrival
        self.leaving: set[int] = set()  # ids of sequences in flight that no longer run
        self.limits = QueueLimits(max_queued)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that are held or wait in fair order."""
        return len(self.held) + self.fairness.num_waiting

    def hold(self, sequence: Sequence, now: float) -> None:
        """Keep a sequence from running until `take_held`."""
        sequence.status = "waiting"
        self.limits.enter(sequence, now)
        self.held[sequence.id] = sequence

    def take_held(self) -> list[Sequence]:
        """Release all held sequences and return them in order of arrival."""
        held, self.held = sorted(self.held.values(), key=by_arrival), {}
        return held

    def seat(self, sequence: Sequence, now: float) -> None:
        """Move a sequence from the fair queue to the running ones. Its blocks must be allocated."""
        self.limits.leave(sequence, now)
        sequence.status = "running"
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = now
            sequence.num_cached_tokens = sequence.device.num_computed
        self.fairness.start(sequence)
        insort(self.running, sequence, key=by_arrival)

    @property
    def num_seated(self) -> int:
        """Number of seats that are taken."""
        return len(self.running) + len(self.leaving)

    def leave_in_flight(self, sequence: Sequence) -> None:
        """Stop running a sequence that the executor may still be working on. Its seat stays taken."""
        self.remove(sequence)
        self.leaving.add(sequence.id)

    def remove(self, sequence: Sequence) -> None:
        """Remove the sequence from its queue or seat."""
        self.leaving.discard(sequence.id)
        self.held.pop(sequence.id, None)
        self.fairness.remove(sequence)
        self.adapter_turns.remove(sequence)
        index = bisect_left(self.running, sequence.id, key=by_arrival)
        if index < len(self.running) and self.running[index] is sequence:
            del self.running[index]

    def clear(self) -> None:
        """Remove all sequences from the running and waiting queues. Held sequences stay held."""
        self.fairness.clear()
        self.adapter_turns.clear()
        self.running = []
        self.leaving.clear()
