"""`Deadlines`: finds sequences that are past a deadline, at no cost until one is."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

from descant.scheduling.sequence import Sequence, SequenceTable
from descant_client.errors import DeadlineExceeded

QUEUE, TOTAL = "waiting in the queue", "answering"
MAX_DEAD = 1024  # entries of sequences that met their deadlines before those are removed


class Deadlines:
    """The deadlines of the sequences of `table`.

    Some choice of a request must have run by its `queue_deadline_s`; it may wait again afterwards. Each choice must
    have ended by its `deadline_s`, parked or not.
    """

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._heap: list[tuple[float, int, str]] = []
        self._max_entries = MAX_DEAD

    def add(self, sequence: Sequence) -> None:
        """Add the deadlines of a sequence."""
        for deadline_s, stage in ((sequence.request.queue_deadline_s, QUEUE), (sequence.request.deadline_s, TOTAL)):
            if deadline_s is not None:
                heappush(self._heap, (deadline_s, sequence.id, stage))
        if len(self._heap) > self._max_entries:
            self._heap = [entry for entry in self._heap if self._find(entry) is not None]
            heapify(self._heap)
            self._max_entries = 2 * len(self._heap) + MAX_DEAD

    @property
    def next_s(self) -> float:
        """Time of the next deadline; infinity if there is none."""
        while self._heap and self._find(self._heap[0]) is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take_expired(self, now: float) -> tuple[Sequence, DeadlineExceeded] | None:
        """Return a sequence that is past a deadline, and the error to finish it with; None if there is none.

        Each is returned once.
        """
        if not self._heap or self.next_s > now:
            return None
        deadline_s, sequence_id, stage = heappop(self._heap)
        sequence = self._table.get(sequence_id)
        assert sequence is not None, "the next entry is of a live sequence"
        return sequence, DeadlineExceeded(stage, round(deadline_s - sequence.request.received_s, 3))

    def _find(self, entry: tuple[float, int, str]) -> Sequence | None:
        """Return the sequence of an entry; None if it is gone or has met this deadline."""
        sequence = self._table.get(entry[1])
        is_met = sequence is None or (entry[2] == QUEUE and sequence.has_started)
        return None if is_met else sequence
