"""The short way of messages to the socket: framing, waiting for a client that does not read, silence after a close."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
import uvicorn
from starlette.applications import Starlette
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN

from descant.websocket.socket_protocol import BINARY, TEXT, SocketProtocol, frame_header

pytestmark = pytest.mark.anyio

HELLO = b"\x81\x05hello"


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed


@pytest.fixture
async def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
async def protocol(transport: FakeTransport) -> SocketProtocol:
    """After its handshake."""
    config = uvicorn.Config(Starlette(), log_config=None, lifespan="off")
    config.load()
    protocol = SocketProtocol(config, ServerState(), {})
    protocol.connection_made(transport)
    protocol.conn.state = OPEN
    protocol.handshake_complete = True
    return protocol


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
@pytest.mark.parametrize(("opcode", "kind"), [(TEXT, Opcode.TEXT), (BINARY, Opcode.BINARY)])
def test_a_message_of_any_size_is_framed_as_websockets_does(opcode: int, kind: Opcode, size: int) -> None:
    payload = bytes(size)

    assert frame_header(opcode, size) + payload == Frame(kind, payload).serialize(mask=False)


async def test_a_message_to_a_client_that_reads_is_written_without_giving_the_loop_a_turn(
    protocol: SocketProtocol, transport: FakeTransport
) -> None:
    with pytest.raises(StopIteration):
        protocol.send_message(TEXT, b"hello").send(None)

    assert transport.written == [HELLO]


async def test_messages_wait_while_the_client_does_not_read_and_are_then_written_whole(
    protocol: SocketProtocol, transport: FakeTransport
) -> None:
    protocol.pause_writing()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(protocol.send_message, TEXT, b"hello")
        tasks.start_soon(protocol.send_message, BINARY, b"there")
        await anyio.wait_all_tasks_blocked()
        assert transport.written == []
        protocol.resume_writing()

    assert sorted(transport.written) == [HELLO, b"\x82\x05there"]


async def test_a_message_that_finds_the_client_stopped_again_goes_on_waiting(
    protocol: SocketProtocol, transport: FakeTransport
) -> None:
    protocol.pause_writing()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(protocol.send_message, TEXT, b"hello")
        await anyio.wait_all_tasks_blocked()
        protocol.resume_writing()
        protocol.pause_writing()
        await anyio.wait_all_tasks_blocked()
        assert transport.written == []
        protocol.resume_writing()

    assert transport.written == [HELLO]


async def test_nothing_is_written_behind_a_close(protocol: SocketProtocol, transport: FakeTransport) -> None:
    protocol.conn.send_close(1000)

    await protocol.send_message(TEXT, b"hello")

    assert transport.written == []


async def test_a_message_to_a_client_that_has_gone_while_it_waited_is_dropped(
    protocol: SocketProtocol, transport: FakeTransport
) -> None:
    protocol.pause_writing()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(protocol.send_message, TEXT, b"hello")
        await anyio.wait_all_tasks_blocked()
        transport.is_closed = True
        protocol.connection_lost(ConnectionResetError())

    assert transport.written == []
