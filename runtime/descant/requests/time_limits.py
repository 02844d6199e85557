"""`TimeLimits`: how long a request may wait and run, counted from its arrival at the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import anyio

from descant.config import SchedulingConfig
from descant.scheduling.deadlines import QUEUE, TOTAL
from descant_client.errors import DeadlineExceeded
from descant_client.protocol import Generate


class TimeLimits(NamedTuple):
    """Arrival of one request on the scheduler's clock (`time.monotonic`), and its limits in seconds. None: no limit."""

    received_s: float
    queue_timeout_s: float | None
    timeout_s: float | None

    @classmethod
    def of(cls, request: Generate, config: SchedulingConfig, received_s: float) -> Self:
        """Return the limits of a request. A client can only shorten those of the server."""
        queue_timeout_s = _shorter(request.queue_timeout_s, config.queue_timeout_s)
        return cls(received_s, queue_timeout_s, _shorter(request.timeout_s, config.timeout_s))

    @property
    def queue_deadline_s(self) -> float | None:
        """Time by which it must have run its first step."""
        return None if self.queue_timeout_s is None else self.received_s + self.queue_timeout_s

    @property
    def deadline_s(self) -> float | None:
        """Time by which it must have ended."""
        return None if self.timeout_s is None else self.received_s + self.timeout_s

    @contextmanager
    def bounding_preparation(self) -> Iterator[None]:
        """Cancel this block, which prepares the request, at the shorter of the two limits.

        Raises:
            DeadlineExceeded: the limit has passed.
        """
        limits = ((self.queue_timeout_s, QUEUE), (self.timeout_s, TOTAL))
        given = [(timeout_s, kind) for timeout_s, kind in limits if timeout_s is not None]
        if not given:
            yield
            return
        timeout_s, kind = min(given)
        with anyio.move_on_after(max(0.0, self.received_s + timeout_s - time.monotonic())) as scope:
            yield
        if scope.cancelled_caught:
            raise DeadlineExceeded(kind, timeout_s)


def _shorter(one: float | None, other: float | None) -> float | None:
    """Return the shorter of two limits."""
    return min((limit for limit in (one, other) if limit is not None), default=None)
