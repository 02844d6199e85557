"""Sessions: what a client comes back to. They belong to the system and outlive both the connection and the gateway.

A session has at most one connection at a time; a newer one takes over. What it holds, streams and operations on
adapters, goes on while it has none, until `ServerConfig.resume_window_s` has passed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import anyio.lowlevel

from descant.contract.principal import Principal
from descant.sessions.operation import Operation
from descant.sessions.outgoing import Outgoing
from descant.sessions.stream import Stream
from descant_client.errors import InvalidRequest, Overloaded, StreamNotFound

RETRY_AFTER_S = 1.0
FINISHED_PER_STREAM = 4  # finished ones a session keeps for each unfinished one it may have


class Session:
    """What one client has asked for, and which of it has something to send."""

    def __init__(self, session_id: str, principal: Principal, max_streams: int, buffer_bytes: int) -> None:
        self.id = session_id
        self.principal = principal
        self.detached_s: float | None = None  # since when it has no connection
        self.connection = 0  # number of the newest connection; an older one finds itself replaced
        self._outgoing: dict[str, Outgoing] = {}
        self._unfinished: dict[str, Outgoing] = {}  # those that may be; looked through only at the limit
        self._changed: dict[str, None] = {}  # request ids, in the order they changed
        self._waker: asyncio.Future[None] | None = None  # what its connection waits on
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes

    def open_stream(self, request_id: str) -> Stream:
        """Make the stream of a new request.

        Raises:
            InvalidRequest: the id is in use.
            Overloaded: too much is unfinished, or finished and not read.
        """
        self._make_room(request_id)
        stream = Stream(request_id, f"{self.id}/{request_id}", self._buffer_bytes, self._mark)
        self._outgoing[request_id] = self._unfinished[request_id] = stream
        return stream

    def open_operation(self, request_id: str) -> Operation:
        """Make the operation of a new request; it counts as a stream. Raises as `open_stream`."""
        self._make_room(request_id)
        operation = Operation(request_id, f"{self.id}/{request_id}", self._mark)
        self._outgoing[request_id] = self._unfinished[request_id] = operation
        return operation

    def outgoing(self, request_id: str) -> Outgoing:
        """Return a stream or operation. Raises StreamNotFound."""
        if request_id not in self._outgoing:
            raise StreamNotFound(request_id)
        return self._outgoing[request_id]

    def release(self, request_id: str) -> None:
        """Forget a stream or operation; nothing happens if there is none."""
        for table in (self._outgoing, self._unfinished, self._changed):
            table.pop(request_id, None)

    def attach(self) -> int:
        """Take note of a new connection; return its number, which ends the one before."""
        self.connection += 1
        self.detached_s = None
        self._wake()
        return self.connection

    async def next_changed(self, connection: int) -> Outgoing | None:
        """Wait for something with something to send; None once another connection has taken over.

        Others have their turn first if there is something at once; what comes meanwhile shares a frame.
        """
        if self._changed:
            await anyio.lowlevel.checkpoint()
        while self.connection == connection:
            if self._changed:
                request_id = next(iter(self._changed))
                del self._changed[request_id]
                return self._outgoing[request_id]
            self._waker = asyncio.get_running_loop().create_future()
            await self._waker
        return None

    def __iter__(self) -> Iterator[Outgoing]:
        return iter(list(self._outgoing.values()))

    def __len__(self) -> int:
        return len(self._outgoing)

    def _make_room(self, request_id: str) -> None:
        if request_id in self._outgoing:
            raise InvalidRequest("request_id", f"{request_id!r} is in use; choose another, or `ack` the finished one.")
        if len(self._unfinished) >= self._max_streams:
            self._unfinished = {key: one for key, one in self._unfinished.items() if not one.is_ended}
            if len(self._unfinished) >= self._max_streams:
                raise Overloaded(f"This session already has {self._max_streams} unfinished streams.", RETRY_AFTER_S)
        max_kept = (1 + FINISHED_PER_STREAM) * self._max_streams
        if len(self._outgoing) >= max_kept:
            self._forget_sent()
            if len(self._outgoing) >= max_kept:
                raise Overloaded(f"This session has {max_kept} streams that its client does not read.", RETRY_AFTER_S)

    def _forget_sent(self) -> None:
        """Forget the older half of what was sent and never acknowledged; half, so that this is seldom done."""
        sent = [(one.is_kept, one.ended_s, one.request_id) for one in self if one.ended_s is not None]
        for _, _, request_id in sorted(sent)[: (len(sent) + 1) // 2]:
            self.release(request_id)

    def _mark(self, outgoing: Outgoing) -> None:
        if self._outgoing.get(outgoing.request_id) is outgoing:
            self._changed[outgoing.request_id] = None
            self._wake()

    def _wake(self) -> None:
        waker, self._waker = self._waker, None
        if waker is not None and not waker.done():
            waker.set_result(None)


class SessionTable:
    """All sessions by id."""

    def __init__(self, max_streams: int, buffer_bytes: int, max_sessions: int = 1024) -> None:
        self._sessions: dict[str, Session] = {}
        self._evicted: list[Session] = []  # forgotten; `expire` has yet to say what was in them
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes
        self._max_sessions = max_sessions  # of one principal

    def attach(self, session_id: str | None, principal: Principal) -> Session:
        """Return the session to go on with: the one asked for if it is this principal's, else a new one.

        For a new one, the principal's session that has been without a connection for longest may have to go.

        Raises:
            Overloaded: the principal has as many sessions as it may, each with a connection.
        """
        session = self._sessions.get(session_id) if session_id else None
        if session is None or session.principal.name != principal.name:
            self._make_room(principal)
            session = Session(secrets.token_urlsafe(16), principal, self._max_streams, self._buffer_bytes)
            self._sessions[session.id] = session
        return session

    def remove(self, session: Session) -> None:
        """Forget a session."""
        self._sessions.pop(session.id, None)

    def expire(self, now_s: float, window_s: float) -> Iterator[Outgoing]:
        """Forget sessions without a connection and finished streams, both older than the window.

        Yields what was in forgotten sessions: whoever runs it should cancel it.
        """
        evicted, self._evicted = self._evicted, []
        for session in evicted:
            yield from session
        for session in list(self._sessions.values()):
            if session.detached_s is not None and now_s - session.detached_s >= window_s:
                self.remove(session)
                yield from session
                continue
            for one in session:
                if one.ended_s is not None and now_s - one.ended_s >= window_s and not one.is_kept:
                    session.release(one.request_id)

    @property
    def is_busy(self) -> bool:
        """Whether something still runs, or has not been sent to a client that is there."""
        return any(
            not one.is_ended or (session.detached_s is None and one.ended_s is None)
            for session in self._sessions.values()
            for one in session
        )

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def _make_room(self, principal: Principal) -> None:
        if len(self._sessions) < self._max_sessions:
            return
        own = [session for session in self if session.principal.name == principal.name]
        if len(own) < self._max_sessions:
            return
        idle = [session for session in own if session.detached_s is not None]
        if not idle:
            raise Overloaded(f"{principal.name} already has {self._max_sessions} connections.", RETRY_AFTER_S)
        oldest = min(idle, key=lambda session: session.detached_s or 0.0)
        self.remove(oldest)
        self._evicted.append(oldest)
