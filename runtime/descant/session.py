"""Sessions: what a client comes back to. They belong to the system and outlive both the connection and the gateway.

A session has at most one connection at a time; a newer one takes over. Its streams go on while it has none, until
`ServerConfig.resume_window_s` has passed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import anyio

from descant.messages import Principal
from descant.stream import Stream
from descant_client.errors import InvalidRequest, Overloaded, StreamNotFound

RETRY_AFTER_S = 1.0


class Session:
    """The streams of one client, and which of them have something to send."""

    def __init__(self, session_id: str, principal: Principal, max_streams: int, buffer_bytes: int) -> None:
        self.id = session_id
        self.principal = principal
        self.detached_s: float | None = None  # since when it has no connection
        self.connection = 0  # number of the newest connection; an older one finds itself replaced
        self._streams: dict[str, Stream] = {}
        self._changed: dict[str, None] = {}  # request ids, in the order they changed
        self._wake = anyio.Event()
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes

    def open_stream(self, request_id: str) -> Stream:
        """Make the stream of a new request.

        Raises:
            InvalidRequest: the id is in use.
            Overloaded: too many unfinished streams.
        """
        if request_id in self._streams:
            raise InvalidRequest("request_id", f"{request_id!r} is in use; choose another, or `ack` the finished one.")
        if sum(not stream.is_ended for stream in self._streams.values()) >= self._max_streams:
            raise Overloaded(f"This session already has {self._max_streams} unfinished streams.", RETRY_AFTER_S)
        stream = Stream(request_id, f"{self.id}/{request_id}", self._buffer_bytes, self._mark)
        self._streams[request_id] = stream
        return stream

    def stream(self, request_id: str) -> Stream:
        """Return a stream. Raises StreamNotFound."""
        if request_id not in self._streams:
            raise StreamNotFound(request_id)
        return self._streams[request_id]

    def close_stream(self, request_id: str) -> None:
        """Forget a stream; nothing happens if there is none."""
        self._streams.pop(request_id, None)
        self._changed.pop(request_id, None)

    def attach(self) -> int:
        """Take note of a new connection; return its number, which ends the one before."""
        self.connection += 1
        self.detached_s = None
        self._wake.set()
        return self.connection

    async def next_changed(self, connection: int) -> Stream | None:
        """Wait for a stream with something to send; None once another connection has taken over."""
        while self.connection == connection:
            if self._changed:
                request_id = next(iter(self._changed))
                del self._changed[request_id]
                return self._streams[request_id]
            self._wake = anyio.Event()
            await self._wake.wait()
        return None

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams.values()))

    def __len__(self) -> int:
        return len(self._streams)

    def _mark(self, stream: Stream) -> None:
        if stream.request_id in self._streams:
            self._changed[stream.request_id] = None
            self._wake.set()


class SessionTable:
    """All sessions by id."""

    def __init__(self, max_streams: int, buffer_bytes: int) -> None:
        self._sessions: dict[str, Session] = {}
        self._max_streams = max_streams
        self._buffer_bytes = buffer_bytes

    def attach(self, session_id: str | None, principal: Principal) -> Session:
        """Return the session to go on with: the one asked for if it is this principal's, else a new one."""
        session = self._sessions.get(session_id) if session_id else None
        if session is None or session.principal.name != principal.name:
            session = Session(secrets.token_urlsafe(16), principal, self._max_streams, self._buffer_bytes)
            self._sessions[session.id] = session
        return session

    def remove(self, session: Session) -> None:
        """Forget a session."""
        self._sessions.pop(session.id, None)

    def expire(self, now_s: float, window_s: float) -> Iterator[Stream]:
        """Forget sessions without a connection and finished streams, both older than the window.

        Yields the streams of forgotten sessions: whoever runs them should cancel them.
        """
        for session in list(self._sessions.values()):
            if session.detached_s is not None and now_s - session.detached_s >= window_s:
                self.remove(session)
                yield from session
                continue
            for stream in session:
                if stream.ended_s is not None and now_s - stream.ended_s >= window_s:
                    session.close_stream(stream.request_id)

    @property
    def is_busy(self) -> bool:
        """Whether a stream still runs, or has not been sent to a client that is there."""
        return any(
            not stream.is_ended or (session.detached_s is None and stream.ended_s is None)
            for session in self._sessions.values()
            for stream in session
        )

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)
