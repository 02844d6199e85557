"""`SocketProtocol`: uvicorn's WebSocket protocol with a shorter path for outgoing messages.

The handshake, pings and closing are uvicorn's. Messages are framed here and written directly to the transport, because
a server spends most of its time on frames of one token.
"""

from __future__ import annotations

import struct

from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

STATE_KEY = "descant.websocket.socket_protocol"
TEXT, BINARY = 1, 2  # opcodes
FINAL = 0x80  # a message is one frame
MAX_SHORT, MAX_MEDIUM = 125, 0xFFFF  # largest payloads in bytes whose length takes no extra bytes, or two
LENGTH_IN_2_BYTES, LENGTH_IN_8_BYTES = 126, 127


class SocketProtocol(WebSocketsSansIOProtocol):
    """Protocol class for `uvicorn.Config(ws=…)`, without extensions. The application gets its instance from `of`."""

    async def run_asgi(self) -> None:
        """Run the application, with this instance in its scope."""
        self.scope.setdefault("state", {})[STATE_KEY] = self
        await super().run_asgi()

    @staticmethod
    def of(socket: WebSocket) -> SocketProtocol:
        """Return the protocol instance of a WebSocket."""
        found = socket.scope["state"][STATE_KEY]
        assert isinstance(found, SocketProtocol), "the gateway listens with it"
        return found

    async def send_message(self, opcode: int, payload: bytes) -> None:
        """Write one frame, waiting while the client does not read. After a close nothing is written.

        Frames of different tasks are never mixed.
        """
        while not self.writable.is_set():
            await self.writable.wait()
        if self.conn.state is OPEN and not self.transport.is_closing():
            self.transport.write(frame_header(opcode, len(payload)) + payload)


def frame_header(opcode: int, size: int) -> bytes:
    """Return the header of a server's frame with a payload of `size` bytes (RFC 6455, section 5.2)."""
    if size <= MAX_SHORT:
        return bytes((FINAL | opcode, size))
    if size <= MAX_MEDIUM:
        return struct.pack("!BBH", FINAL | opcode, LENGTH_IN_2_BYTES, size)
    return struct.pack("!BBQ", FINAL | opcode, LENGTH_IN_8_BYTES, size)
