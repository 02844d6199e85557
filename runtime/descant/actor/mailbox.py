"""The bounded mailbox of an actor."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from descant_client.errors import DescantError

Reply = asyncio.Future[Any]
Envelope = tuple[Any, Reply | None]  # a message, and the future of the ask it came with


class Mailbox:
    """A bounded queue of (message, reply or None) in order of arrival, with one taker.

    Senders that find it full wait in `overflow`. The taker moves them in, so that the order of arrival is kept.
    """

    __slots__ = ("closed", "high_water", "overflow", "queue", "size", "waker")

    def __init__(self, size: int) -> None:
        self.size = size
        self.queue: deque[Envelope] = deque()
        # Senders waiting for room: their message, and the future that is done once it is queued (asks have none).
        self.overflow: deque[tuple[Envelope, asyncio.Future[None] | None]] = deque()
        self.high_water = 0
        self.waker: asyncio.Future[None] | None = None  # awaited by the taker
        self.closed: Callable[[], DescantError] | None = None  # makes the error of every later sender

    def offer(self, envelope: Envelope) -> bool:
        """Append if there is room and return whether there was. Raise the error that the mailbox was closed with."""
        queue = self.queue
        if self.closed is not None:
            raise self.closed()
        if len(queue) >= self.size:
            return False
        queue.append(envelope)
        if self.waker is not None:
            self.wake()
        return True

    def wake(self) -> None:
        waker, self.waker = self.waker, None
        if waker is not None and not waker.done():
            waker.set_result(None)

    def take(self) -> Envelope:
        """Remove the first message and let the first waiting sender in. The queue must not be empty."""
        depth = len(self.queue)
        if depth > self.high_water:
            self.high_water = depth
        envelope = self.queue.popleft()
        if self.overflow:
            self._admit()
        return envelope

    def _admit(self) -> None:
        while self.overflow and len(self.queue) < self.size:
            envelope, room = self.overflow.popleft()
            waiting = room if room is not None else envelope[1]
            if waiting is None or waiting.done():  # cancelled in this turn of the loop
                continue
            self.queue.append(envelope)
            if room is not None:
                room.set_result(None)

    def forget(self, envelope: Envelope) -> None:
        """Drop a sender that was cancelled while it waited for room."""
        self.overflow = deque(entry for entry in self.overflow if entry[0] is not envelope)

    def flush(self, make_error: Callable[[], DescantError]) -> None:
        """Empty the mailbox. Queued asks and waiting senders get the error; queued tells are lost."""
        waiting = [reply for _, reply in self.queue]
        for (_, reply), room in self.overflow:
            waiting += (reply, room)
        self.queue.clear()
        self.overflow.clear()
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(make_error())

    def close(self, make_error: Callable[[], DescantError]) -> None:
        """Flush, and give the same error to every later sender."""
        if self.closed is None:
            self.closed = make_error
            self.flush(make_error)
