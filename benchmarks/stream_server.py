"""The servers measured by `streaming.py`, each in a process of its own.

    python benchmarks/stream_server.py descant|bare PACE

PACE is in tokens per second of each stream; 0 means unlimited. The bare server ignores it. Each server prints its port,
serves until SIGTERM, and collects garbage on SIGUSR1.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs, urlsplit

import anyio
import msgspec
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from descant.actor.remote_child import Notify
from descant.actors.executor import Executor
from descant.assembly.system import running
from descant.config import Config, ModelConfig, SchedulingConfig, ServerConfig
from descant.contract.child_config import ExecutorConfig
from descant.contract.executor import EngineReady
from descant.engine.dummy import DummyEngine, DummyOptions
from descant_client.protocol import SUBPROTOCOLS

MAX_STREAMS = 1024
MAX_CONTEXT = 1 << 21
NUM_BLOCKS = 1 << 18  # 4 million tokens: no preemption


async def descant(pace: float) -> None:
    """Serve Descant with the dummy engine."""
    with tempfile.TemporaryDirectory() as data_dir:
        config = Config(
            data_dir=data_dir,
            server=ServerConfig(port=0, max_streams=MAX_STREAMS, max_sessions=MAX_STREAMS),
            model=ModelConfig(engine="dummy", dummy_tokens_per_s=pace),
            scheduling=SchedulingConfig(max_num_seqs=MAX_STREAMS, max_num_batched_tokens=2 * MAX_STREAMS),
        )
        async with running(config, executor_factory=f"{Path(__file__).stem}:start_executor") as system:
            await system.ready()
            print(system.port, flush=True)
            await _until_told()


def start_executor(config: bytes, notify: Notify) -> Executor:
    """Start the executor in its process: the dummy engine, with room for all streams."""
    settings = msgspec.msgpack.decode(config, type=ExecutorConfig)
    engine = DummyEngine(
        DummyOptions(
            tokens_per_s=settings.dummy_tokens_per_s,
            num_blocks=NUM_BLOCKS,
            max_context=MAX_CONTEXT,
            max_num_batched_tokens=settings.options.max_num_batched_tokens,
            max_steps_in_flight=settings.options.pipeline_depth,
        )
    )
    notify(EngineReady(engine.limits, engine.info))
    return Executor(engine, 0)


async def bare(pace: float) -> None:
    """Serve frames of one size with `websockets` itself. Each path `/NAME?streams=…&bytes=…&text=…` is a room.

    Every message is answered by `accepted` and starts one more stream of frames to its connection. Once all streams of
    a room are started, rounds begin: a frame for each stream, then a turn of the event loop, as after a step.
    """
    rooms: dict[str, Room] = {}

    async def handle(connection: ServerConnection) -> None:
        assert connection.request is not None, "the handshake is over"
        path = connection.request.path
        room = rooms.setdefault(path, Room(path))
        try:
            async for _ in connection:
                await connection.send(b"accepted")
                room.streams.append(connection)
                if len(room.streams) == room.num_streams:
                    room.task = asyncio.create_task(room.send())
        finally:
            rooms.pop(path, None)
            if room.task is not None:
                room.task.cancel()

    subprotocols = [Subprotocol(name) for name in SUBPROTOCOLS]
    async with serve(handle, "127.0.0.1", 0, compression=None, subprotocols=subprotocols) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await _until_told()


class Room:
    """The streams of one measurement."""

    def __init__(self, path: str) -> None:
        query = parse_qs(urlsplit(path).query)
        self.num_streams, size, text = (int(query.get(name, ["0"])[0]) for name in ("streams", "bytes", "text"))
        self.streams: list[ServerConnection] = []
        self.task: asyncio.Task[None] | None = None
        self._payload = b"x" * size
        self._is_text = bool(text)

    async def send(self) -> None:
        """Send rounds until a connection is closed."""
        payload, is_text = self._payload, self._is_text
        try:
            while True:
                for connection in self.streams:
                    await connection.send(payload, text=is_text)
                await asyncio.sleep(0)
        except ConnectionClosed:
            return


async def _until_told() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        await anext(signals)


def _collect_garbage(number: int, at: FrameType | None) -> None:
    gc.collect()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the executor's process finds its factory
    signal.signal(signal.SIGUSR1, _collect_garbage)
    server = {"descant": descant, "bare": bare}[sys.argv[1]]
    anyio.run(server, float(sys.argv[2]), backend_options={"loop_factory": uvloop.new_event_loop})
