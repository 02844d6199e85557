"""`WebSocketConnection`: a reader and a writer over one session.

The reader sends its own answers before it reads the next frame, so a client that does not read is not read from.
Requests run as tasks of the gateway, not of the connection, so they outlive it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import anyio
import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from descant.__about__ import __version__
from descant.actor.errors import AskTimeout
from descant.config import is_loopback
from descant.contract.principal import Principal
from descant.messages import AdapterList, Authenticate, CancelRequest, ListRegistered, Unpark
from descant.requests.change import make_change
from descant.requests.generate import start_stream
from descant.requests.services import Services
from descant.sessions.outgoing import Outgoing, error_message
from descant.sessions.session import Session
from descant.websocket.socket_protocol import BINARY, TEXT, SocketProtocol
from descant_client.errors import (
    DeadlineExceeded,
    DescantError,
    Draining,
    InvalidRequest,
    Overloaded,
    StreamNotFound,
    Unauthorized,
)
from descant_client.lifecycle import AdapterChange, Adapters
from descant_client.protocol import (
    JSON_SUBPROTOCOL,
    PROTOCOL_VERSION,
    SUBPROTOCOLS,
    Ack,
    Cancel,
    ClientMessage,
    Generate,
    Hello,
    Limits,
    ListAdapters,
    ListModels,
    Models,
    OpenAdapter,
    Resume,
    ServerMessage,
    decode_client,
    request_id_of,
)

FEATURES = [
    "adapters",
    "deadlines",
    "lifecycle",
    "logprobs",
    "merges",
    "prompt_logprobs",
    "resume",
    "speculation",
    "weighted_sums",
]
ASK_TIMEOUT_S = 30.0
NORMAL_CLOSURE = 1000
POLICY_VIOLATION = 1008
INTERNAL_ERROR = 1011
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013
CLOSE_CODES = {Unauthorized: POLICY_VIOLATION, Overloaded: TRY_AGAIN_LATER}
CLOSE_TIMEOUT_S = 1.0
StartTask = Callable[..., None]


class WebSocketConnection:
    """One connection: `descant_client.protocol` over a WebSocket.

    `start_task` starts a task of the gateway. `draining` returns the reason why new requests are refused, if they are.
    """

    def __init__(
        self, socket: WebSocket, services: Services, start_task: StartTask, draining: Callable[[], str | None]
    ):
        self._socket = socket
        self._services = services
        self._start_task = start_task
        self._draining = draining
        offered = socket.scope.get("subprotocols", [])
        self._subprotocol = next((name for name in SUBPROTOCOLS if name in offered), None)
        is_text = (self._subprotocol or JSON_SUBPROTOCOL) == JSON_SUBPROTOCOL
        self._opcode = TEXT if is_text else BINARY
        self._encode = msgspec.json.encode if is_text else msgspec.msgpack.encode
        self._protocol = SocketProtocol.of(socket)
        self._session: Session

    async def serve(self) -> None:
        """Run until either side closes. Cancelling closes the socket; the session is kept until it expires."""
        await self._socket.accept(subprotocol=self._subprotocol)
        try:
            principal = await self._authenticate()
            await self._services.model.ready()
            asked_id = self._socket.query_params.get("session")
            self._session = self._services.sessions.open_or_resume(asked_id, principal)
        except DescantError as error:
            await self._send(error_message(error))
            await self._close(CLOSE_CODES.get(type(error), INTERNAL_ERROR), error.code)
            return
        number = self._session.attach()
        try:
            await self._send(self._hello())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, number, tasks.cancel_scope)
                await self._read(number)
                tasks.cancel_scope.cancel()
        finally:
            self._session.detach(number, time.monotonic())
            with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await self._close(SERVICE_RESTART)

    async def _close(self, code: int, reason: str | None = None) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(code, reason)

    # ---- reading ----------------------------------------------------------------------------------

    async def _authenticate(self) -> Principal:
        origin = self._socket.headers.get("origin")
        if origin is not None and not self._services.config.keys and not _is_local(origin):
            raise Unauthorized(f"Without API keys only pages of this machine may connect, not those of {origin}.")
        scheme, _, key = self._socket.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""
        return await self._services.auth.ask(Authenticate(key or None), timeout=ASK_TIMEOUT_S)

    async def _read(self, number: int) -> None:
        while True:
            try:
                event = await self._socket.receive()
            except (WebSocketDisconnect, RuntimeError):
                return
            if event["type"] == "websocket.disconnect":
                # After a normal closure the client will not resume, unless a newer connection already has.
                if event.get("code") == NORMAL_CLOSURE and self._session.is_current(number):
                    await self._abandon()
                return
            await self._receive(event["bytes"] if event.get("text") is None else event["text"])

    async def _receive(self, frame: str | bytes) -> None:
        try:
            if len(frame) > self._services.config.server.max_frame_bytes:
                raise InvalidRequest("frame", f"larger than {self._services.config.server.max_frame_bytes} bytes.")
            message = decode_client(frame)
        except DescantError as error:
            await self._send(error_message(error, request_id_of(frame)))
            return
        try:
            await self._handle(message)
        except DescantError as error:
            await self._send(error_message(error, message.request_id))

    async def _handle(self, message: ClientMessage) -> None:
        match message:
            case Generate():
                self._refuse_if_draining()
                stream = self._session.open_stream(message.request_id)
                self._start_task(start_stream, self._services, message, stream, self._session.principal)
            case Cancel(request_id):
                await self._cancel(self._session.outgoing(request_id))
            case Resume(request_id, have):
                self._session.outgoing(request_id).resume(have)
            case Ack(request_id):
                self._acknowledge(request_id)
            case ListAdapters(request_id):
                await self._list_adapters(request_id, None)
            case OpenAdapter(request_id, name):
                await self._list_adapters(request_id, name)
            case ListModels(request_id):
                await self._send(Models(request_id=request_id, models=[self._services.model.info]))
            case _:
                self._operate(message)

    def _operate(self, change: AdapterChange) -> None:
        self._refuse_if_draining()
        operation = self._session.open_operation(change.request_id)
        self._start_task(make_change, self._services, change, operation, self._session.principal)

    def _refuse_if_draining(self) -> None:
        reason = self._draining()
        if reason is not None:
            raise Draining(reason)

    def _acknowledge(self, request_id: str) -> None:
        with contextlib.suppress(StreamNotFound):  # released already
            if self._session.outgoing(request_id).is_ended:
                self._session.release(request_id)

    async def _list_adapters(self, request_id: str, name: str | None) -> None:
        question = ListRegistered(self._session.principal, name)
        try:
            answer: AdapterList = await self._services.registry.ask(question, timeout=ASK_TIMEOUT_S)
        except AskTimeout as exc:
            raise DeadlineExceeded("looking adapters up", ASK_TIMEOUT_S) from exc
        await self._send(Adapters(request_id=request_id, adapters=list(answer.adapters)))

    async def _cancel(self, outgoing: Outgoing) -> None:
        outgoing.cancel()
        await self._services.scheduler.tell(CancelRequest(outgoing.key))

    async def _abandon(self) -> None:
        self._services.sessions.remove(self._session)
        for outgoing in self._session:
            if not outgoing.is_ended:
                await self._cancel(outgoing)

    # ---- writing ----------------------------------------------------------------------------------

    async def _write(self, number: int, scope: anyio.CancelScope) -> None:
        while (outgoing := await self._session.next_changed(number)) is not None:
            for message in outgoing.render():
                await self._send(message)
            if outgoing.is_end_rendered:
                outgoing.on_end_sent(time.monotonic())
            unparked = outgoing.take_unparked()
            if unparked:
                await self._services.scheduler.tell(Unpark(unparked))
        scope.cancel()  # a newer connection has replaced this one

    def _hello(self) -> Hello:
        config = self._services.config.server
        return Hello(
            protocol=PROTOCOL_VERSION,
            server=f"descant/{__version__}",
            session=self._session.id,
            features=FEATURES,
            limits=Limits(
                max_frame_bytes=config.max_frame_bytes,
                max_streams=config.max_streams,
                max_choices=config.max_choices,
                resume_window_s=config.resume_window_s,
            ),
            model=self._services.model.info,
        )

    def _send(self, message: ServerMessage) -> Awaitable[None]:
        return self._protocol.send_message(self._opcode, self._encode(message))


def _is_local(origin: str) -> bool:
    """Return whether a page of that origin comes from this machine. Browsers send an origin; other clients need not."""
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False
