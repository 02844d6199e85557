"""A small server for tests of the client: it implements the protocol without a model, and fails on request.

The output of a request is a function of its prompt: `token_ids` are echoed, each token `t` has the text `"t "`, and the
text lags one token behind, as it does for incomplete characters and stop strings. So a resumed stream can be checked in
full.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
from anyio.abc import TaskGroup
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from descant_client.errors import AdapterNotFound, DescantError, InvalidRequest, StreamNotFound
from descant_client.lifecycle import AdapterChange, Adapters
from descant_client.protocol import (
    SUBPROTOCOLS,
    Accepted,
    Ack,
    Cancel,
    ChoiceEnd,
    ClientMessage,
    Delta,
    Done,
    Error,
    Generate,
    Hello,
    Limits,
    ListAdapters,
    ListModels,
    ModelInfo,
    Models,
    OpenAdapter,
    Progress,
    Resume,
    ServerMessage,
    TokenLogprob,
    Usage,
    decode_client,
    encoder_for,
)
from descant_client.timings import Timings
from fake_catalog import FakeCatalog

SEED = 1234
DEADLINE_S = 30.0  # limit of an `async with FakeServer()`, so that a test fails in place of hanging
ADAPTER_NAMES = ("reverse", "upper")
Kept = Generate | Adapters | Error  # the resumable part of a request, which a session keeps by request id
MODEL = ModelInfo("demo", 512, 256, "float32", "cpu")


def text_of(token_ids: list[int]) -> str:
    """Return the whole text of an output."""
    return "".join(f"{token_id} " for token_id in token_ids)


class FakeServer:
    """A server that listens on a free port for the length of an `async with`.

    `drops`: connection number i is aborted once it has sent `drops[i]` frames after its hello (0: when it receives its
    first message, which it does not read). Connections beyond the list are not aborted. `hold`: outputs stop after this
    number of tokens until cancelled. `holds_answers`: adapters are changed, but the client gets the answer only when it
    resumes the request. `tamper` may replace each outgoing message by any messages and raw frames. `refusal` is sent in
    place of a hello.
    """

    def __init__(
        self,
        *,
        drops: list[int] | None = None,
        token: str | None = None,
        hold: int | None = None,
        max_frame_bytes: int = 1 << 20,
        tamper: Callable[[ServerMessage], list[ServerMessage | str | bytes]] | None = None,
        refusal: DescantError | None = None,
        rng_seed: int = 0,
    ) -> None:
        self.received: list[ClientMessage] = []
        self.num_connections = 0
        self.uri = ""
        self.authorization: str | None = None
        self.subprotocol: str | None = None
        self.tamper = tamper or (lambda message: [message])
        self.refusal = refusal
        self._drops = list(drops or [])
        self._token = token
        self.hold = hold
        self.max_frame_bytes = max_frame_bytes
        self.rng = random.Random(rng_seed)
        self.holds_answers = False
        self.catalog = FakeCatalog(ADAPTER_NAMES)
        self._sessions: dict[str, dict[str, Kept]] = {}
        self._num_sessions = 0
        self._news = anyio.Event()
        self._stack = AsyncExitStack()
        self._server: Server | None = None

    async def __aenter__(self) -> FakeServer:
        self._stack.enter_context(anyio.fail_after(DEADLINE_S))
        self._server = await self._stack.enter_async_context(
            serve(self._handle, "127.0.0.1", 0, subprotocols=list(SUBPROTOCOLS), process_request=self._check)  # type: ignore[arg-type]
        )
        self.uri = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self.abort()
        await self._stack.aclose()

    async def stop(self) -> None:
        """Stop listening and abort every connection."""
        assert self._server is not None
        self._server.close(close_connections=False)
        self.abort()
        await self._server.wait_closed()

    def abort(self) -> None:
        """Abort every connection without a closing handshake."""
        assert self._server is not None
        for websocket in self._server.connections:
            websocket.transport.abort()

    def forget(self) -> None:
        """Discard every session, as a restart does."""
        self._sessions.clear()

    async def wait_for(self, is_wanted: Callable[[ClientMessage], bool]) -> ClientMessage:
        """Wait for a received message for which `is_wanted` is true, and return the first."""
        while True:
            for message in self.received:
                if is_wanted(message):
                    return message
            self._news = anyio.Event()
            await self._news.wait()

    def note(self, message: ClientMessage) -> None:
        """Record a message from a client."""
        self.received.append(message)
        self._news.set()

    def _check(self, websocket: ServerConnection, request: Request) -> Response | None:
        self.authorization = request.headers.get("Authorization")
        if self._token is not None and self.authorization != f"Bearer {self._token}":
            return websocket.respond(HTTPStatus.UNAUTHORIZED, "no such key")
        return None

    async def _handle(self, websocket: ServerConnection) -> None:
        assert websocket.request is not None
        url = urlsplit(websocket.request.path)
        assert url.path == "/ws", f"the path is {url.path}"
        self.subprotocol = websocket.subprotocol
        asked = parse_qs(url.query).get("session", [""])[0]
        if asked not in self._sessions:
            self._num_sessions += 1
            asked = f"session-{self._num_sessions}"
            self._sessions[asked] = {}
        budget = self._drops[self.num_connections] if self.num_connections < len(self._drops) else None
        self.num_connections += 1
        async with anyio.create_task_group() as group:
            peer = _Peer(self, websocket, group, asked, self._sessions[asked], budget)
            await peer.run()
            group.cancel_scope.cancel()


class _Peer:
    """One connection of the fake server."""

    def __init__(
        self,
        server: FakeServer,
        websocket: ServerConnection,
        group: TaskGroup,
        session: str,
        requests: dict[str, Kept],
        budget: int | None,
    ) -> None:
        self._server = server
        self._websocket = websocket
        self._group = group
        self._session = session
        self._requests = requests
        self._budget = budget
        self._encode = encoder_for(str(websocket.subprotocol))
        self._cancelled: dict[str, anyio.Event] = {}

    async def run(self) -> None:
        try:
            if self._server.refusal is not None:
                await self._websocket.send(self._encode(error_frame(self._server.refusal)))
                await self._websocket.close(1008)
                return
            limits = Limits(self._server.max_frame_bytes, max_streams=64, max_choices=8, resume_window_s=60.0)
            await self._websocket.send(self._encode(Hello("1.0", "fake/1", self._session, [], limits, MODEL)))
            async for frame in self._websocket:
                if self._budget == 0:
                    self._websocket.transport.abort()
                    return
                await self._on_message(decode_client(frame))
        except ConnectionClosed:
            return

    async def _on_message(self, message: ClientMessage) -> None:
        self._server.note(message)
        match message:
            case Generate():
                await self._on_generate(message)
            case Resume():
                kept = self._requests.get(message.request_id)
                if isinstance(kept, Generate):
                    self._start(kept, dict(message.have))
                else:
                    await self._send(kept or error_frame(StreamNotFound(message.request_id), message.request_id))
            case Cancel():
                if message.request_id in self._cancelled:
                    self._cancelled[message.request_id].set()
            case Ack():
                self._requests.pop(message.request_id, None)
            case ListAdapters():
                await self._send(Adapters(message.request_id, self._server.catalog.all()))
            case OpenAdapter():
                await self._send(Adapters(message.request_id, self._server.catalog.all(message.name)))
            case ListModels():
                await self._send(Models(message.request_id, [MODEL]))
            case _:
                await self._on_change(message)

    async def _on_change(self, change: AdapterChange) -> None:
        try:
            answer: Adapters | Error = Adapters(change.request_id, self._server.catalog.change(change))
        except DescantError as error:
            answer = error_frame(error, change.request_id)
        self._requests[change.request_id] = answer
        await self._send(Progress(change.request_id, "changing"))
        if not self._server.holds_answers:
            await self._send(answer)

    async def _on_generate(self, request: Generate) -> None:
        if request.request_id in self._requests:
            await self._send(error_frame(InvalidRequest("request_id", "it is in use."), request.request_id))
        elif request.adapter is not None and not self._server.catalog.all(request.adapter):
            await self._send(error_frame(AdapterNotFound(request.adapter), request.request_id))
        else:
            self._requests[request.request_id] = request
            self._start(request, {})

    def _start(self, request: Generate, have: dict[int, int]) -> None:
        cancelled = self._cancelled[request.request_id] = anyio.Event()
        self._group.start_soon(self._stream, request, have, cancelled)

    async def _stream(self, request: Generate, have: dict[int, int], cancelled: anyio.Event) -> None:
        seed = SEED if request.seed is None else request.seed
        outputs = [output_of(request, choice) for choice in range(request.n)]
        sent = [have.get(choice, 0) for choice in range(request.n)]
        ends = [len(output) for output in outputs]
        if self._server.hold is not None:
            ends = [min(end, self._server.hold) for end in ends]
        await self._send(Accepted(request.request_id, seed, len(outputs[0])))
        await self._send(Progress(request.request_id, "preparing_adapter"))
        while sent != ends and self._cancelled[request.request_id] is cancelled:  # else replaced by a later `resume`
            choice = self._server.rng.choice([choice for choice in range(request.n) if sent[choice] < ends[choice]])
            start = sent[choice]
            sent[choice] = min(ends[choice], start + self._server.rng.randint(1, 3))
            await self._send(delta_of(request, choice, start, outputs[choice][: sent[choice]]))
            await anyio.lowlevel.checkpoint()
        if self._server.hold is not None:
            await cancelled.wait()
        if self._cancelled[request.request_id] is cancelled:
            await self._send(done_of(request, seed, [output[:end] for output, end in zip(outputs, ends, strict=True)]))

    async def _send(self, message: ServerMessage) -> None:
        for out in self._server.tamper(message):
            if self._budget == 0:
                self._websocket.transport.abort()
                return
            if self._budget is not None:
                self._budget -= 1
            try:
                await self._websocket.send(out if isinstance(out, str | bytes) else self._encode(out))
            except ConnectionClosed:
                return


def output_of(request: Generate, choice: int) -> list[int]:
    """Return the output of one choice: the prompt's tokens, shifted by the choice."""
    prompt_ids = request.token_ids if request.token_ids is not None else list((request.prompt or "chat").encode())
    return [token_id + choice for token_id in prompt_ids]


def delta_of(request: Generate, choice: int, start: int, output_ids: list[int]) -> Delta:
    """Return the delta of `output_ids[start:]`; its text lags one token behind."""
    token_ids = output_ids[start:]
    logprobs = None
    if request.logprobs is not None:
        logprobs = [TokenLogprob(token_id, text_of([token_id]), -0.5) for token_id in token_ids]
    text = text_of(output_ids[max(start - 1, 0) : -1])
    return Delta(request.request_id, choice, start, text, token_ids, logprobs)


def done_of(request: Generate, seed: int, outputs: list[list[int]]) -> Done:
    """Return the end of a stream with these outputs."""
    reason = "stop" if len(outputs[0]) == len(output_of(request, 0)) else "cancelled"
    return Done(
        request.request_id,
        seed,
        [ChoiceEnd(i, reason, len(output), text_of(output[-1:])) for i, output in enumerate(outputs)],
        Usage(len(outputs[0]), sum(len(output) for output in outputs)),
        Timings(0.0, 0.1, 0.2),
        None if request.prompt_logprobs is None else [None],
    )


def error_frame(error: DescantError, request_id: str | None = None) -> Error:
    """Return the message of an error."""
    return Error(error.code, str(error), request_id, error.data())
