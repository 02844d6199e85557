"""One session with a server: carries messages through reconnects and routes each to its request."""

from __future__ import annotations

import logging
from collections import deque
from itertools import count
from typing import Protocol

import anyio
import msgspec
from websockets.exceptions import ConnectionClosed

from descant_client.dialer import Dialer, Link
from descant_client.errors import ConnectionLost, DescantError, InternalError, InvalidRequest, Unauthorized, from_wire
from descant_client.handshake import CLOSE_S
from descant_client.protocol import (
    Ack,
    Cancel,
    ClientMessage,
    Error,
    Hello,
    Resume,
    ServerMessage,
    decode_server,
    request_id_of,
)

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """A request as the connection sees it: it gets the messages that carry its `request_id`. No method waits.

    `open` sends the request, `reopen` continues it after a reconnect, `fail` ends it, and `cancel` asks the server to
    end it, if the server can. `is_answered` is whether the server has shown that it knows the request.
    """

    @property
    def request_id(self) -> str: ...
    @property
    def is_answered(self) -> bool: ...
    @property
    def is_finished(self) -> bool: ...
    def open(self) -> None: ...
    def reopen(self, *, is_same_session: bool, was_sent: bool) -> None: ...
    def receive(self, message: ServerMessage) -> None: ...
    def fail(self, error: DescantError) -> None: ...
    def cancel(self) -> None: ...


class Connection:
    """One session: an outbox of messages, the receivers of answers, and the link that carries both.

    A lost link is replaced; when the dialer gives up, every open request fails.
    """

    def __init__(self, dialer: Dialer) -> None:
        self._dialer = dialer
        self._link: Link | None = None
        self._receivers: dict[str, Receiver] = {}
        self._outbox: deque[ClientMessage] = deque()
        self._has_mail = anyio.Event()
        self._ids = count(1)
        self._lost: DescantError | None = None  # set once, when no request can succeed any more

    # ---- for the client and its requests --------------------------------------------------------------------------

    @property
    def hello(self) -> Hello:
        """The server's hello on the current link: version, limits, base model."""
        return self._current.hello

    @property
    def uri(self) -> str:
        """WebSocket address of the server."""
        return self._dialer.uri

    def new_request_id(self) -> str:
        """Return an id that no request of this session has had."""
        return f"{next(self._ids):x}"

    def send(self, message: ClientMessage) -> None:
        """Add a message to the outbox, without waiting for the socket."""
        self._outbox.append(message)
        self._has_mail.set()

    def add(self, receiver: Receiver) -> None:
        """Open a receiver and route messages to it, through reconnects, until it has finished.

        Once the session is lost, fail the receiver at once.
        """
        if self._lost is not None:
            receiver.fail(self._lost)
            return
        self._receivers[receiver.request_id] = receiver
        receiver.open()

    def drop(self, receiver: Receiver) -> None:
        """Stop routing to a receiver. Later messages for it are ignored."""
        self._receivers.pop(receiver.request_id, None)

    # ---- life -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect for the first time, in one attempt. Raises as `shake_hands`."""
        self._link = await self._dialer.open()

    async def run(self) -> None:
        """Carry messages until the session is lost; then fail every open request and return."""
        try:
            while True:
                reason = await self._converse()
                if self._lost is not None:
                    raise self._lost
                logger.info("connection to %s dropped: %s", self.uri, reason)
                await self._reconnect(reason)
        except DescantError as exc:
            self._give_up(exc)

    async def close(self) -> None:
        """Cancel every open request, send the messages left in the outbox, and close the socket.

        Call it after `run` has ended. It takes at most 2 s and is shielded from cancellation.
        """
        for receiver in list(self._receivers.values()):
            receiver.cancel()
        if self._link is not None:
            with anyio.move_on_after(CLOSE_S, shield=True):
                try:
                    while self._outbox:
                        await self._write_one()
                except ConnectionClosed:
                    logger.debug("closed with %d messages unsent", len(self._outbox))
                await self._link.websocket.close()
        self._give_up(ConnectionLost(self.uri, "the client was closed."))

    async def _converse(self) -> str:
        """Read and write until the socket is closed. Return the reason."""
        reason = ""
        async with anyio.create_task_group() as group:
            group.start_soon(self._write)
            reason = await self._read()
            group.cancel_scope.cancel()
        return reason

    async def _read(self) -> str:
        try:
            while self._lost is None:
                self._dispatch(await self._current.websocket.recv())
        except ConnectionClosed as exc:
            return f"{exc}."
        return f"{self._lost}"

    # ---- outgoing -------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        try:
            while True:
                while self._outbox:
                    await self._write_one()
                self._has_mail = anyio.Event()
                await self._has_mail.wait()
        except ConnectionClosed:
            return  # the reader sees it as well, and returns the reason

    async def _write_one(self) -> None:
        """Send the first message of the outbox. A message that cannot be sent fails its own request only."""
        message = self._outbox.popleft()
        try:
            frame = self._current.encode(message)
            num_bytes = len(frame) if isinstance(frame, bytes) else len(frame.encode())
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as exc:
            self._refuse(message.request_id, InvalidRequest("request", f"{exc}."))
            return
        max_bytes = self.hello.limits.max_frame_bytes
        if num_bytes > max_bytes:  # the server would drop the connection, and again after each reconnect
            reason = f"it takes {num_bytes} bytes, the server accepts {max_bytes}."
            self._refuse(message.request_id, InvalidRequest("request", reason))
        else:
            await self._current.websocket.send(frame)

    # ---- incoming -------------------------------------------------------------------------------------------------

    def _dispatch(self, frame: str | bytes) -> None:
        self._current.has_progressed = True
        try:
            message = decode_server(frame)
        except msgspec.DecodeError as exc:
            request_id = request_id_of(frame)
            logger.warning("unreadable message for request %s: %s", request_id, exc)
            self._refuse(request_id, InternalError(f"its message cannot be read: {exc}."))
            return
        match message:
            case None | Hello():
                return  # a message type of a newer server, or a second hello: no answer depends on either
            case Error(request_id=None):
                self._on_connection_error(from_wire(message.code, message.message, message.data))
            case _ if receiver := self._receivers.get(message.request_id or ""):
                receiver.receive(message)
                if receiver.is_finished:
                    self.drop(receiver)

    def _refuse(self, request_id: str | None, error: DescantError) -> None:
        receiver = self._receivers.pop(request_id or "", None)
        if receiver is not None:
            receiver.fail(error)

    def _on_connection_error(self, error: DescantError) -> None:
        """Handle an error without a request id: `Unauthorized` ends the session.

        Any other error is the answer to one of the requests that have none yet; all of these fail with it.
        """
        if isinstance(error, Unauthorized):
            self._lost = error
            return
        logger.warning("the server reports: %s", error)
        for receiver in [one for one in self._receivers.values() if not one.is_answered]:
            self._refuse(receiver.request_id, error)

    # ---- loss and return ------------------------------------------------------------------------------------------

    @property
    def _current(self) -> Link:
        assert self._link is not None, "open() comes first"
        return self._link

    async def _reconnect(self, reason: str) -> None:
        """Open another link and continue every open request on it. Raises as `Dialer.reopen`."""
        lost = self._current
        self._link = await self._dialer.reopen(lost, reason)
        self._reopen(is_same_session=self.hello.session == lost.hello.session)

    def _reopen(self, *, is_same_session: bool) -> None:
        """Empty the outbox and let every open request continue on the new link.

        Acknowledgments lost with the outbox do no harm: the server releases finished requests by itself in time.
        """
        unsent = {message.request_id for message in self._outbox if not isinstance(message, Resume | Cancel | Ack)}
        self._outbox.clear()
        for receiver in list(self._receivers.values()):
            receiver.reopen(is_same_session=is_same_session, was_sent=receiver.request_id not in unsent)
            if receiver.is_finished:
                self.drop(receiver)

    def _give_up(self, error: DescantError) -> None:
        self._lost = self._lost or error
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.fail(error)
