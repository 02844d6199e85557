"""`Deadlines`: which sequences have run out of time. Looking costs nothing until one has."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

from descant.scheduling.sequence import Sequence, SequenceTable
from descant_client.errors import DeadlineExceeded

QUEUE, TOTAL = "waiting in the queue", "answering"
MAX_DEAD = 1024  # entries of sequences that met their deadlines, before they are swept out


class Deadlines:
    """Watches sequences of `table` until they are removed from it.

    Some choice of a request must have run by its `queue_deadline_s`, whatever becomes of it afterwards, and each must
    have ended by its `deadline_s`, parked or not.
    """

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._heap: list[tuple[float, int, str]] = []
        self._max_entries = MAX_DEAD

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence."""
        for deadline_s, what in ((sequence.request.queue_deadline_s, QUEUE), (sequence.request.deadline_s, TOTAL)):
            if deadline_s is not None:
                heappush(self._heap, (deadline_s, sequence.id, what))
        if len(self._heap) > self._max_entries:
            self._heap = [entry for entry in self._heap if self._find(entry) is not None]
            heapify(self._heap)
            self._max_entries = 2 * len(self._heap) + MAX_DEAD

    @property
    def next_s(self) -> float:
        """When the next deadline passes; infinity if none will."""
        while self._heap and self._find(self._heap[0]) is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take_expired(self, now: float) -> tuple[Sequence, DeadlineExceeded] | None:
        """Return a sequence that ought to be finished by now, and why, once."""
        if not self._heap or self.next_s > now:
            return None
        deadline_s, sequence_id, what = heappop(self._heap)
        sequence = self._table.get(sequence_id)
        assert sequence is not None, "only what is live is next"
        return sequence, DeadlineExceeded(what, round(deadline_s - sequence.request.received_s, 3))

    def _find(self, entry: tuple[float, int, str]) -> Sequence | None:
        """Return the sequence of an entry that still means something."""
        sequence = self._table.get(entry[1])
        is_met = sequence is None or (entry[2] == QUEUE and sequence.has_started)
        return None if is_met else sequence
