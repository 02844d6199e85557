"""`QueueLimits`: limits the waiting sequences of each principal, and estimates when there is room again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from descant.scheduling.sequence import Sequence
from descant_client.errors import InvalidRequest, Overloaded

MEMORY_S = 10.0  # time constant of the rate at which sequences leave the queue
MIN_RETRY_S, MAX_RETRY_S = 1, 60


@dataclass(slots=True)
class Rate:
    """Events per second; older events count less."""

    since_s: float  # time from which on events are possible
    _count: float = 0.0
    _last_s: float = 0.0

    def add_event(self, now: float) -> None:
        """Count one event."""
        self._count = self._decayed(now) + 1.0
        self._last_s = now

    def per_second(self, now: float) -> float:
        """Return the rate; 0 without any event."""
        seen_s = -MEMORY_S * math.expm1(-(now - self.since_s) / MEMORY_S)  # as if events had been counted evenly
        return self._decayed(now) / max(seen_s, 1e-3)

    def _decayed(self, now: float) -> float:
        return self._count * math.exp(-(now - self._last_s) / MEMORY_S) if self._count else 0.0


@dataclass(slots=True)
class _Queue:
    rate: Rate
    waiting: set[int] = field(default_factory=set[int])


class QueueLimits:
    """Counts the sequences that wait for the executor, an adapter, blocks or a seat."""

    def __init__(self, max_queued: int | None) -> None:
        self._max_queued = max_queued
        self._queues: dict[str, _Queue] = {}

    def check(self, sequences: list[Sequence], now: float) -> None:
        """Check that the choices of one request may wait.

        Raises:
            InvalidRequest: there are more of them than may ever wait.
            Overloaded: too many others wait; it gives the time until there may be room, by the recent rate of leaving.
        """
        first = sequences[0]
        limit = self._max_queued if first.request.max_queued is None else first.request.max_queued
        if limit is None:
            return
        if len(sequences) > limit:
            raise InvalidRequest("n", f"at most {limit} sequences of one principal may wait.")
        queue = self._queues.get(first.request.principal)
        num_over = len(sequences) + (len(queue.waiting) if queue else 0) - limit
        if queue is not None and num_over > 0:
            rate = queue.rate.per_second(now)
            retry_s = min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(num_over / rate))) if rate > 0 else MIN_RETRY_S
            reason = f"{len(queue.waiting)} sequences wait already, and at most {limit} may (max_queued)."
            raise Overloaded(reason, retry_s)

    def enter(self, sequence: Sequence, now: float) -> None:
        """Count a sequence that waits."""
        queue = self._queues.get(sequence.request.principal)
        if queue is None:
            queue = self._queues[sequence.request.principal] = _Queue(Rate(now))
        queue.waiting.add(sequence.id)

    def leave(self, sequence: Sequence, now: float) -> None:
        """Stop counting a sequence that runs or is finished. It may not have waited."""
        queue = self._queues.get(sequence.request.principal)
        if queue is not None and sequence.id in queue.waiting:
            queue.waiting.remove(sequence.id)
            if sequence.first_scheduled_s is None:  # preempted sequences come back and leave again
                queue.rate.add_event(now)

    def num_waiting_by_principal(self) -> dict[str, int]:
        """Return the number of waiting sequences of each principal that has any."""
        return {name: len(queue.waiting) for name, queue in self._queues.items() if queue.waiting}
