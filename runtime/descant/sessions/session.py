"""Sessions: the requests of one client, kept over reconnects. They outlive connections and lives of the gateway.

A session has at most one connection at a time; a newer one replaces it. Without a connection its streams and operations
continue. After `ServerConfig.resume_window_s` the session is removed and its unfinished streams are cancelled.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import anyio.lowlevel

from descant.contract.principal import Principal
from descant.sessions.operation import OutgoingOperation
from descant.sessions.outgoing import Outgoing
from descant.sessions.stream import OutgoingStream
from descant_client.errors import InvalidRequest, Overloaded, StreamNotFound

RETRY_AFTER_S = 1.0
FINISHED_PER_STREAM = 4  # finished streams kept for each unfinished one that is allowed


class Session:
    """Streams and operations of one client, and which of them have something to send."""

    def __init__(self, session_id: str, principal: Principal, max_streams: int, buffer_bytes: int) -> None:
        self.id = session_id
        self.principal = principal
        self.detached_s: float | None = None  # time at which its last connection closed; None: it has one
        self.connection = 0  # number of the newest connection
        self._outgoing: dict[str, Outgoing] = {}
        self._unfinished: dict[str, Outgoing] = {}  # includes ended ones, which are removed at the limit
        self._changed: dict[str, None] = {}  # request ids, in the order they changed
        self._waker: asyncio.Future[None] | None = None  # awaited by its connection
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes

    def open_stream(self, request_id: str) -> OutgoingStream:
        """Add the stream of a new request.

        Raises:
            InvalidRequest: the id is in use.
            Overloaded: too many are unfinished, or finished and not read.
        """
        self._make_room(request_id)
        stream = OutgoingStream(request_id, f"{self.id}/{request_id}", self._buffer_bytes, self._mark)
        self._outgoing[request_id] = self._unfinished[request_id] = stream
        return stream

    def open_operation(self, request_id: str) -> OutgoingOperation:
        """Add the operation of a new request. It counts as a stream. Raises as `open_stream`."""
        self._make_room(request_id)
        operation = OutgoingOperation(request_id, f"{self.id}/{request_id}", self._mark)
        self._outgoing[request_id] = self._unfinished[request_id] = operation
        return operation

    def outgoing(self, request_id: str) -> Outgoing:
        """Return a stream or operation. Raises StreamNotFound."""
        if request_id not in self._outgoing:
            raise StreamNotFound(request_id)
        return self._outgoing[request_id]

    def release(self, request_id: str) -> None:
        """Remove a stream or operation. Do nothing if there is none."""
        for table in (self._outgoing, self._unfinished, self._changed):
            table.pop(request_id, None)

    def attach(self) -> int:
        """Register a new connection and return its number. The connection before it is replaced."""
        self.connection += 1
        self.detached_s = None
        self._wake()
        return self.connection

    def detach(self, connection: int, now_s: float) -> None:
        """Record that a connection has closed. Ignored if a newer one has replaced it."""
        if self.is_current(connection):
            self.detached_s = now_s

    def is_current(self, connection: int) -> bool:
        """Return whether no newer connection has replaced this one."""
        return self.connection == connection

    async def next_changed(self, connection: int) -> Outgoing | None:
        """Return the next answer with something to send, None once a newer connection has replaced this one.

        If there is one already, other tasks run first, so that tokens that arrive meanwhile share its frame. Cancelling
        the wait loses no answer.
        """
        if self._changed:
            await anyio.lowlevel.checkpoint()
        while self.is_current(connection):
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
        """Remove half of the answers that were sent and not acknowledged: streams before operations, the oldest first.

        Half of them at once, so that the search is seldom repeated.
        """
        sent = [(one.is_kept, one.end_sent_s, one.request_id) for one in self if one.end_sent_s is not None]
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
        self._evicted: list[Session] = []  # removed to make room; `expire` yields their contents
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes
        self._max_sessions = max_sessions  # of one principal

    def open_or_resume(self, session_id: str | None, principal: Principal) -> Session:
        """Return the session of that id if it belongs to the principal, else a new one.

        A new one may replace the principal's session that has been without a connection for longest.

        Raises:
            Overloaded: the principal has the maximum number of sessions, each with a connection.
        """
        session = self._sessions.get(session_id) if session_id else None
        if session is None or session.principal.name != principal.name:
            self._make_room(principal)
            session = Session(secrets.token_urlsafe(16), principal, self._max_streams, self._buffer_bytes)
            self._sessions[session.id] = session
        return session

    def remove(self, session: Session) -> None:
        """Remove a session."""
        self._sessions.pop(session.id, None)

    def expire(self, now_s: float, window_s: float) -> Iterator[Outgoing]:
        """Remove sessions without a connection for `window_s`, and streams whose end was sent that long ago.

        Yields the streams and operations of the sessions removed, evicted sessions included. The caller cancels them.
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
                if one.end_sent_s is not None and now_s - one.end_sent_s >= window_s and not one.is_kept:
                    session.release(one.request_id)

    @property
    def is_busy(self) -> bool:
        """Whether a request still runs, or its answer has not been sent to a client that is connected."""
        return any(
            not one.is_ended or (session.detached_s is None and one.end_sent_s is None)
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
