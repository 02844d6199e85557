"""Opening a socket to a server: its address, the credentials, the subprotocol, and the server's hello."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import anyio
import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_websocket
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from descant_client.errors import ConnectionLost, InvalidRequest, Unauthorized, from_wire
from descant_client.protocol import SUBPROTOCOLS, Error, Hello, decode_server

CLOSE_S = 2.0  # limit of the closing handshake
_OPEN_S = 10.0  # limit of connecting
_HELLO_S = 600.0  # limit of waiting for hello, sent once the model is loaded; pings detect a dead server earlier
_POLICY_VIOLATION = 1008  # the close code of a refused client
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


def endpoint(uri: str) -> str:
    """Return the WebSocket address of a server given as `ws://host:port`, or with `wss`, `http` or `https`.

    The path is kept; if there is none, it becomes `/ws`.

    Raises:
        InvalidRequest: the text is not such an address.
    """
    try:
        parts = urlsplit(uri)
        scheme, port = _SCHEMES[parts.scheme], parts.port
        if not parts.hostname or port == 0:
            raise ValueError("no host or port")
    except (ValueError, KeyError) as exc:
        raise InvalidRequest("uri", f"{uri!r} is no server's address. Give one like ws://127.0.0.1:8080.") from exc
    path = parts.path if parts.path.strip("/") else "/ws"
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


async def shake_hands(
    uri: str, *, token: str | None, subprotocols: tuple[str, ...], session: str | None
) -> tuple[ClientConnection, Hello]:
    """Open a socket to `uri`, an address as `endpoint` returns it, and read the server's hello.

    `session` is the id of the session to resume, None for a new one. Cancelling closes the socket.

    Raises:
        ConnectionLost: no Descant server answers at the address.
        Unauthorized: the server refuses the token.
        DescantError: the server sends this error in place of the hello.
    """
    websocket = await _open_socket(_with_session(uri, session), token, subprotocols)
    try:
        if websocket.subprotocol not in SUBPROTOCOLS:
            raise ConnectionLost(uri, f"the server speaks none of {', '.join(subprotocols)}.")
        return websocket, await _read_hello(uri, websocket)
    except BaseException:
        websocket.transport.abort()
        raise


def _with_session(uri: str, session: str | None) -> str:
    if session is None:
        return uri
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query), ("session", session)])))


async def _open_socket(uri: str, token: str | None, subprotocols: tuple[str, ...]) -> ClientConnection:
    try:
        return await open_websocket(
            uri,
            subprotocols=[Subprotocol(name) for name in subprotocols],
            additional_headers={} if token is None else {"Authorization": f"Bearer {token}"},
            compression=None,  # tokens are small, and a compressor's buffering would delay them
            max_size=None,
            open_timeout=_OPEN_S,
            close_timeout=CLOSE_S,
        )
    except InvalidStatus as exc:
        status = exc.response.status_code
        if status in (401, 403):
            raise Unauthorized(f"The server refused this client (HTTP {status}).") from exc
        raise ConnectionLost(uri, f"the server answered HTTP {status}.") from exc
    except ConnectionRefusedError as exc:
        raise ConnectionLost(uri, "nothing listens there. Start a server with `descant serve`.") from exc
    except (OSError, TimeoutError, InvalidHandshake) as exc:
        raise ConnectionLost(uri, f"{str(exc) or type(exc).__name__}.") from exc


async def _read_hello(uri: str, websocket: ClientConnection) -> Hello:
    try:
        with anyio.fail_after(_HELLO_S):
            message = decode_server(await websocket.recv())
    except TimeoutError as exc:
        raise ConnectionLost(uri, f"no hello within {_HELLO_S:g} s.") from exc
    except ConnectionClosed as exc:
        if exc.rcvd is not None and exc.rcvd.code == _POLICY_VIOLATION:
            raise Unauthorized(exc.rcvd.reason or "The server refused this client.") from exc
        raise ConnectionLost(uri, "closed before the server's hello.") from exc
    except msgspec.DecodeError as exc:
        raise ConnectionLost(uri, f"the server's hello is not readable: {exc}.") from exc
    if isinstance(message, Error):
        raise from_wire(message.code, message.message, message.data)
    if not isinstance(message, Hello):
        raise ConnectionLost(uri, "the server did not begin with hello.")
    return message
