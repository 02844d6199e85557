"""The gateway actor: the one listening socket.

Accepts: Drain. Asks: auth, registry, scheduler (through its connections). Owns: the listener, its connections, the
tasks of requests in preparation. Sessions and streams belong to the system.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import anyio
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from descant.__about__ import __version__
from descant.actor.actor import Actor
from descant.actor.address import ActorStats
from descant.actor.endpoint import Remote
from descant.actor.launcher import Launching
from descant.messages import CancelRequest, Drain, GatewayMessage
from descant.requests.generate import fail_request
from descant.requests.services import Services
from descant.websocket.connection import WebSocketConnection
from descant.websocket.socket_protocol import SocketProtocol
from descant_client.errors import ConfigInvalid, InternalError

logger = logging.getLogger(__name__)

SWEEP_S = 1.0
BACKLOG = 2048


class Health(msgspec.Struct, frozen=True):
    """The body of `/health`."""

    status: str
    version: str
    model: str
    executor_lives: int
    steps: int
    adapter_loads: int
    sessions: int
    sequences: int
    drafts: int  # verified drafts
    drafted_tokens: int  # tokens on the longest paths through their trees
    accepted_tokens: int  # tokens of them that were accepted, each of which saved a step
    executor_pid: int | None  # None between two lives
    worker_pid: int | None  # likewise, and with the dummy engine
    launcher_pid: int | None  # likewise, and without a launcher
    actors: list[ActorStats]


class Children(NamedTuple):
    """The processes of the server."""

    executor: Remote[Any]
    worker: Remote[Any] | None
    launcher: Launching | None


class Gateway(Actor[GatewayMessage]):
    """Listens for connections and owns the tasks that they start, so that these outlive them."""

    def __init__(
        self,
        services: Services,
        listener: socket.socket,
        stats: Callable[[], list[ActorStats]],
        children: Children,
    ) -> None:
        self._services = services
        self._listener = listener
        self._stats = stats
        self._children = children
        self._draining: str | None = None
        self._server: uvicorn.Server | None = None
        self._closed = anyio.Event()

    async def on_start(self) -> None:
        """Begin to accept connections."""
        routes = [
            WebSocketRoute("/ws", self._websocket),
            Route("/health", self._health),
            Route("/ready", self._ready),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            ws=SocketProtocol,
            ws_max_size=4 * self._services.config.server.max_frame_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        self._end_orphans()
        self._server = _Server(config)
        self.start_soon(self._listen, self._server)
        self.start_soon(self._sweep)

    def _end_orphans(self) -> None:
        # The tasks of these requests ended with the previous life.
        for session in self._services.sessions:
            for one in session:
                if not (one.is_submitted or one.is_ended):
                    fail_request(self._services, one, InternalError(one.orphaned))

    async def on_receive(self, message: GatewayMessage) -> None:
        """Answer one message."""
        match message:
            case Drain(reason):
                self._draining = reason

    async def on_stop(self) -> None:
        """Close every connection with a closing handshake."""
        if self._server is not None:
            self._server.should_exit = True
            await self._closed.wait()

    async def _listen(self, server: uvicorn.Server) -> None:
        # A duplicate: uvicorn closes its sockets, and the next life of this actor listens again.
        sockets = [self._listener.dup()]
        try:
            await server.serve(sockets)
        except anyio.get_cancelled_exc_class():  # this life crashed: close the connections that it left open
            server.force_exit = True
            with anyio.CancelScope(shield=True):
                await server.shutdown(sockets)
            raise
        finally:
            self._closed.set()

    async def _websocket(self, websocket: WebSocket) -> None:
        await WebSocketConnection(websocket, self._services, self.start_soon, lambda: self._draining).serve()

    async def _health(self, request: Request) -> Response:
        model, drafts = self._services.model, self._services.sequences.draft_counts()
        health = Health(
            status="draining" if self._draining else "ok" if model.is_up else "starting",
            version=__version__,
            model=model.id,
            executor_lives=model.num_lives,
            steps=model.num_steps,
            adapter_loads=model.num_adapter_loads,
            sessions=len(self._services.sessions),
            sequences=len(self._services.sequences),
            drafts=drafts.num_drafts,
            drafted_tokens=drafts.num_drafted,
            accepted_tokens=drafts.num_accepted,
            executor_pid=self._children.executor.pid,
            worker_pid=self._children.worker and self._children.worker.pid,
            launcher_pid=self._children.launcher and self._children.launcher.pid,
            actors=self._stats(),
        )
        return Response(msgspec.json.encode(health), media_type="application/json")

    async def _ready(self, request: Request) -> Response:
        is_ready = self._services.model.is_up and self._services.model.num_steps > 0 and self._draining is None
        return Response(status_code=200 if is_ready else 503)

    async def _sweep(self) -> None:
        window_s = self._services.config.server.resume_window_s
        while True:
            await anyio.sleep(SWEEP_S)
            for one in self._services.sessions.expire(time.monotonic(), window_s):
                one.cancel()
                await self._services.scheduler.tell(CancelRequest(one.key))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # the command line handles signals
        yield


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket listening on `host`:`port` (0: a free port). Raises ConfigInvalid if that is impossible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio disables Nagle's algorithm only on sockets that are marked as TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as exc:
        listener.close()
        reason = exc.strerror if isinstance(exc, OSError) else None
        raise ConfigInvalid("server.port", f"cannot listen on {host}:{port}: {reason or exc}.") from exc
    return listener
